"""What each kind of credential does in each condition, by store: tests check it, and docs/credentials.md shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from attrs import field, frozen

__all__ = ["S3", "STORES", "CheckedBy", "Kind", "Outcome", "Store"]

#: What answered in the test: an emulator of the store alone; a stand-in, before an emulator or in its place; no server.
CheckedBy = Literal["emulator", "stand-in", "no server"]


@frozen
class Outcome:
    """The end of a load.

    Attributes:
        cause: The likely cause in the error; empty where the load succeeds.
        checked_by: What answered in the test.
    """

    cause: str
    checked_by: CheckedBy


@frozen
class Kind:
    """One kind of credential.

    Attributes:
        name: Its name in tests and on the page.
        given_by: How to give it, in Markdown.
        outcomes: By condition. A condition that cannot occur is left out.
        doctor: Whether a test compares what the doctor says.
    """

    name: str
    given_by: str
    outcomes: Mapping[str, Outcome]
    doctor: bool = False


@frozen
class Store:
    """The kinds of one store.

    Attributes:
        name: Its name.
        package: The plugin.
        order: In which order credentials are looked up, in Markdown.
        emulator: The emulator that took part in the tests.
        stand_ins: What stood for the services of the cloud.
        kinds: The kinds, in the order of the lookup.
        notes: What else a user needs to know, in Markdown.
    """

    name: str
    package: str
    order: tuple[str, ...]
    emulator: str
    stand_ins: str
    kinds: tuple[Kind, ...]
    notes: tuple[str, ...] = field(default=())

    def kind(self, name: str) -> Kind:
        """Return the kind with this name."""
        return next(kind for kind in self.kinds if kind.name == name)

    def cases(self, *, doctor: bool = False) -> list[tuple[str, str]]:
        """Return all kinds and conditions, or those that the doctor is tested with."""
        kinds = [kind for kind in self.kinds if kind.doctor or not doctor]
        return [(kind.name, condition) for kind in kinds for condition in kind.outcomes]


def _loads(checked_by: CheckedBy) -> Outcome:
    return Outcome("", checked_by)


def _fails(cause: str, checked_by: CheckedBy = "stand-in") -> Outcome:
    return Outcome(cause, checked_by)


# -- S3 ----------------------------------------------------------------------------------------------------------------

_S3_NONE = (
    "neither variables nor a profile give any, and AWS_EC2_METADATA_DISABLED keeps from asking for the machine's role"
)
_S3_NO_PROFILE = "AWS_PROFILE is misspelt, or the files are elsewhere"
_S3_NO_FILE = "the token is not mounted here, or is readable for another user only"
_S3_WRONG_KEY = "the secret does not belong to the access key, or a proxy changes the requests"
_S3_LOGIN = "the login of the profile ran out, or this machine has none"
_S3_DELETED_KEY = (
    "the access key was deleted, belongs to another endpoint, or is a temporary one (ASIA...) whose AWS_SESSION_TOKEN "
    "is missing"
)
_S3_RAN_OUT = "the temporary credentials ran out"
_S3_PROGRAM = "credential_process in the profile is misspelt, or its program fails here"
_S3_AGAIN = "new credentials were fetched in the middle of the load, and S3 refuses those too"
_S3_NOT_PUBLIC = "requests are not signed (MX_S3_ANONYMOUS), and the bucket is not public"
_S3_MAY_NOT_LIST = "these credentials may not list the bucket"
_S3_MAY_NOT_READ = "these credentials may not read it, or it does not exist and they may not list the bucket"


def _s3_renewable(
    missing: Outcome,
    wrong: Outcome,
    *,
    rights_checked_by: CheckedBy = "stand-in",
    again: str = _S3_AGAIN,
) -> Mapping[str, Outcome]:
    """The outcomes of credentials that can be looked for again in the middle of a load."""
    return {
        "valid": _loads(rights_checked_by),
        "missing": missing,
        "wrong": wrong,
        "expired, and renewed": _loads("stand-in"),
        "expired, and refused again": _fails(again),
        "may not list": _fails(_S3_MAY_NOT_LIST, rights_checked_by),
        "may not read": _fails(_S3_MAY_NOT_READ, rights_checked_by),
    }


S3 = Store(
    name="S3",
    package="mx-s3",
    order=(
        "`MX_S3_ANONYMOUS=1`: requests are not signed",
        "`AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, with `AWS_SESSION_TOKEN`",
        "a role that the profile names (`role_arn`)",
        "`AWS_WEB_IDENTITY_TOKEN_FILE` and `AWS_ROLE_ARN`",
        "single sign-on of the profile",
        "keys of the profile in the credentials file",
        "`credential_process` of the profile",
        "keys of the profile in the config file",
        "`AWS_CONTAINER_CREDENTIALS_FULL_URI` or `AWS_CONTAINER_CREDENTIALS_RELATIVE_URI`",
        "the instance metadata service, unless `AWS_EC2_METADATA_DISABLED=true`",
    ),
    emulator="SeaweedFS",
    stand_ins=(
        "STS, single sign-on, the agent of containers, the instance metadata service (IMDSv2), and S3 where it refuses "
        "session tokens or credentials that ran out"
    ),
    kinds=(
        Kind(
            "anonymous",
            "`MX_S3_ANONYMOUS=1`, for public buckets",
            {
                "valid": _loads("emulator"),
                "may not list": _fails(_S3_NOT_PUBLIC, "emulator"),
                "may not read": _fails(_S3_NOT_PUBLIC, "emulator"),
            },
            doctor=True,
        ),
        Kind(
            "access key",
            "`AWS_ACCESS_KEY_ID=AKIA... AWS_SECRET_ACCESS_KEY=...`",
            {
                "valid": _loads("emulator"),
                "missing": _fails(_S3_NONE, "no server"),
                "wrong": _fails(_S3_WRONG_KEY, "emulator"),
                "may not list": _fails(_S3_MAY_NOT_LIST, "emulator"),
                "may not read": _fails(_S3_MAY_NOT_READ, "emulator"),
            },
            doctor=True,
        ),
        Kind(
            "session token",
            "`AWS_ACCESS_KEY_ID=ASIA... AWS_SECRET_ACCESS_KEY=... AWS_SESSION_TOKEN=...`",
            {
                "valid": _loads("stand-in"),
                "missing": _fails(_S3_DELETED_KEY),
                "wrong": _fails("the session token is not the one of this access key"),
                "expired": _fails(_S3_RAN_OUT),
                "may not list": _fails(_S3_MAY_NOT_LIST),
                "may not read": _fails(_S3_MAY_NOT_READ),
            },
            doctor=True,
        ),
        Kind(
            "assumed role",
            "`AWS_PROFILE=serving`; in `~/.aws/config`, `[profile serving]` has `role_arn` and `source_profile` (or "
            "`credential_source`)",
            _s3_renewable(
                _fails(
                    "AWS_WEB_IDENTITY_TOKEN_FILE without AWS_ROLE_ARN, or a profile with a role and no source for it",
                    "no server",
                ),
                _fails("the trust policy of the role does not allow it to this token or user"),
            ),
        ),
        Kind(
            "web identity (EKS: IRSA)",
            "`AWS_WEB_IDENTITY_TOKEN_FILE=/var/run/secrets/eks.amazonaws.com/serviceaccount/token "
            "AWS_ROLE_ARN=arn:aws:iam::123456789012:role/serving`; EKS sets both",
            _s3_renewable(
                _fails(_S3_NO_FILE, "no server"),
                _fails(
                    "the account has no OIDC provider for the issuer of the token, or the token is meant for another "
                    "audience"
                ),
            ),
            doctor=True,
        ),
        Kind(
            "single sign-on",
            "`AWS_PROFILE=serving`, after `aws sso login --profile serving`",
            _s3_renewable(
                _fails(_S3_LOGIN, "no server"),
                _fails("the single sign-on does not give this user the role of the profile"),
            ),
        ),
        Kind(
            "keys of a profile",
            "`AWS_PROFILE=serving`; `~/.aws/credentials` has `[serving]` with `aws_access_key_id` and "
            "`aws_secret_access_key`",
            _s3_renewable(
                _fails(_S3_NO_PROFILE, "no server"),
                _fails(_S3_WRONG_KEY, "emulator"),
                rights_checked_by="emulator",
                again=_S3_RAN_OUT,
            ),
            doctor=True,
        ),
        Kind(
            "`credential_process`",
            "`AWS_PROFILE=serving`; in `~/.aws/config`, `[profile serving]` has `credential_process = /path/program`",
            _s3_renewable(
                _fails(_S3_PROGRAM, "no server"), _fails(_S3_PROGRAM, "no server"), rights_checked_by="emulator"
            ),
        ),
        Kind(
            "container (ECS, EKS Pod Identity)",
            "`AWS_CONTAINER_CREDENTIALS_FULL_URI=http://169.254.170.23/v1/credentials "
            "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE=/var/run/secrets/pods.eks.amazonaws.com/serviceaccount/"
            "eks-pod-identity-token`; ECS and EKS set them",
            _s3_renewable(
                _fails(_S3_NO_FILE, "no server"),
                _fails(
                    "it does not know this container, or AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE does not hold the "
                    "token that it gave"
                ),
            ),
            doctor=True,
        ),
        Kind(
            "instance metadata (EC2)",
            "nothing: the role of the machine. Containers need a hop limit of 2",
            {
                **_s3_renewable(
                    _fails(
                        "neither variables nor a profile give any, and this machine has no role, or its metadata "
                        "service cannot be reached (from a container that takes a hop limit of 2)",
                        "no server",
                    ),
                    _fails(
                        "neither variables nor a profile give any, and this machine has no role, or its metadata "
                        "service cannot be reached (from a container that takes a hop limit of 2)"
                    ),
                )
            },
            doctor=True,
        ),
    ),
    notes=(
        "A profile goes after keys in `environ` of a load, and before keys of the process's environment.",
        "Keys in variables cannot change while a process runs, so they are never looked for again.",
    ),
)

STORES = (S3,)
