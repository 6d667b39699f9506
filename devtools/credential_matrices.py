"""What each kind of credential does in each condition, by store: tests check it, and docs/credentials.md shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from attrs import field, frozen

__all__ = ["AZURE", "GCS", "HF", "S3", "STORES", "CheckedBy", "Kind", "Outcome", "Store"]

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
    expired: Outcome | None = None,
    *,
    rights_checked_by: CheckedBy = "stand-in",
    again: str = _S3_AGAIN,
) -> Mapping[str, Outcome]:
    """The outcomes of credentials that can be looked for again in the middle of a load."""
    return {
        "valid": _loads(rights_checked_by),
        "missing": missing,
        "wrong": wrong,
        **({"expired": expired} if expired is not None else {}),
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
                _fails("the token in AWS_WEB_IDENTITY_TOKEN_FILE, or what else the role is assumed with, ran out"),
            ),
            doctor=True,
        ),
        Kind(
            "single sign-on",
            "`AWS_PROFILE=serving`, after `aws sso login --profile serving`",
            _s3_renewable(
                _fails(_S3_LOGIN, "no server"),
                _fails("the single sign-on does not give this user the role of the profile"),
                _fails(_S3_LOGIN, "no server"),
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
        "`aws login` works too, with a version of botocore that knows it; no test covers it.",
        "Keys in variables cannot change while a process runs, so they are never looked for again.",
    ),
)

# -- GCS ---------------------------------------------------------------------------------------------------------------

_GCS_NO_FILE = "GOOGLE_APPLICATION_CREDENTIALS, or the credential_source in its file, is misspelt or not mounted here"
_GCS_LOGIN_ENDED = "the login of the user ran out or was revoked"
_GCS_POOL = (
    "the workload identity pool does not accept the token of this workload: it ran out, or has another issuer or "
    "audience than the provider expects"
)
_GCS_MAY_NOT_ACT = "these credentials may not act as that service account"
_GCS_NOT_PUBLIC = "requests carry no credentials (MX_GCS_ANONYMOUS, or an emulator), and the bucket is not public"
_GCS_MAY_NOT_LIST = "these credentials may not list the bucket"
_GCS_MAY_NOT_READ = "these credentials may not read it, or it does not exist and they may not list the bucket"


def _gcs(missing: Outcome, wrong: str) -> Mapping[str, Outcome]:
    """The outcomes of a kind that fetches tokens."""
    return {
        "valid": _loads("stand-in"),
        "missing": missing,
        "wrong": _fails(wrong),
        "expired, and renewed": _loads("stand-in"),
        "expired, and refused again": _fails(
            "the access token ran out or was revoked, and a newly fetched one is refused too, or is the same"
        ),
        "may not list": _fails(_GCS_MAY_NOT_LIST),
        "may not read": _fails(_GCS_MAY_NOT_READ),
    }


GCS = Store(
    name="Google Cloud Storage",
    package="mx-gcs",
    order=(
        "`MX_GCS_ANONYMOUS=1`, or an emulator in `STORAGE_EMULATOR_HOST`: requests carry no credentials",
        "the file in `GOOGLE_APPLICATION_CREDENTIALS`",
        "the login of `gcloud auth application-default login`",
        "the metadata server, unless `NO_GCE_CHECK=true`",
    ),
    emulator="fake-gcs-server",
    stand_ins=(
        "the check of tokens, which the emulator lacks; OAuth, STS, IAM Credentials and the metadata server, which "
        "give tokens"
    ),
    kinds=(
        Kind(
            "anonymous",
            "`MX_GCS_ANONYMOUS=1`, for public buckets",
            {
                "valid": _loads("stand-in"),
                "may not list": _fails(_GCS_NOT_PUBLIC),
                "may not read": _fails(_GCS_NOT_PUBLIC),
            },
            doctor=True,
        ),
        Kind(
            "key of a service account",
            "`GOOGLE_APPLICATION_CREDENTIALS=/etc/keys/loader.json`",
            _gcs(
                _fails(_GCS_NO_FILE, "no server"),
                "the key of the service account was deleted or disabled, or the file was altered",
            ),
            doctor=True,
        ),
        Kind(
            "login of a user in a file",
            "`GOOGLE_APPLICATION_CREDENTIALS=/path/login.json`",
            _gcs(_fails(_GCS_NO_FILE, "no server"), _GCS_LOGIN_ENDED),
        ),
        Kind(
            "workload identity federation",
            "`GOOGLE_APPLICATION_CREDENTIALS=/etc/federation.json`, which "
            "`gcloud iam workload-identity-pools create-cred-config` writes",
            _gcs(_fails(_GCS_NO_FILE, "no server"), _GCS_POOL),
        ),
        Kind(
            "workload identity federation with impersonation",
            "the same, with `--service-account=reader@project.iam.gserviceaccount.com`",
            _gcs(_fails(_GCS_NO_FILE, "no server"), _GCS_POOL),
        ),
        Kind(
            "impersonated service account in a file",
            "`GOOGLE_APPLICATION_CREDENTIALS=/path/impersonated.json`, which `gcloud auth application-default login` "
            "writes with `--impersonate-service-account`",
            _gcs(_fails(_GCS_NO_FILE, "no server"), _GCS_LOGIN_ENDED),
        ),
        Kind(
            "login of gcloud",
            "`gcloud auth application-default login`, once",
            _gcs(
                _fails(
                    "neither GOOGLE_APPLICATION_CREDENTIALS nor a login of gcloud gives any, and NO_GCE_CHECK keeps "
                    "from asking the metadata server",
                    "no server",
                ),
                _GCS_LOGIN_ENDED,
            ),
            doctor=True,
        ),
        Kind(
            "metadata server (Compute Engine, GKE, Cloud Run)",
            "nothing: the service account of the machine or pod",
            _gcs(
                _fails("the metadata server of this machine or pod does not answer, or not yet", "no server"),
                "this machine has no service account",
            ),
            doctor=True,
        ),
        Kind(
            "impersonation with any of these",
            "`MX_GCS_IMPERSONATE_SERVICE_ACCOUNT=reader@project.iam.gserviceaccount.com`",
            _gcs(_fails(_GCS_NO_FILE, "no server"), _GCS_MAY_NOT_ACT),
        ),
        Kind(
            "project that pays (Requester Pays)",
            "`MX_GCS_USER_PROJECT=my-project`, with any of these",
            {
                "valid": _loads("stand-in"),
                "missing": _fails("the bucket has Requester Pays: the project of the reader pays"),
                "wrong": _fails(
                    "these credentials may not bill the project in MX_GCS_USER_PROJECT, or it does not exist"
                ),
            },
            doctor=True,
        ),
    ),
    notes=(
        "`MX_GCS_IMPERSONATE_SERVICE_ACCOUNT` acts as another service account with the credentials that are found.",
    ),
)

# -- Azure -------------------------------------------------------------------------------------------------------------

_AZURE_NONE = "no variable holds a credential, this machine has no managed identity, and no developer tool is logged in"
_AZURE_NO_FILE = "the file is not mounted here, or is readable for another user only"
_AZURE_WRONG_KEY = "the key is not one of this account, was rotated, or a proxy changes the requests"
_AZURE_NOT_PUBLIC = "the container is not public, or the firewall of the account does not allow this network"
_AZURE_NO_IDENTITY = "this machine has no managed identity, or not the one that AZURE_CLIENT_ID names"
_AZURE_PERMISSION = "the SAS token lacks a permission: reading needs r, listing needs l"
_AZURE_ROLE = "the identity has no role that lets it read data: Storage Blob Data Reader is missing"


def _azure_identity(missing: Outcome, wrong: Outcome, expired: Outcome | None = None) -> Mapping[str, Outcome]:
    """The outcomes of an identity of Entra ID."""
    return {
        "valid": _loads("stand-in"),
        "missing": missing,
        "wrong": wrong,
        **({"expired": expired} if expired is not None else {}),
        "expired, and renewed": _loads("stand-in"),
        "expired, and refused again": _fails(
            "a new token was fetched in the middle of the load, and the service refuses that too"
        ),
        "may not list": _fails(_AZURE_ROLE),
        "may not read": _fails(_AZURE_ROLE),
    }


AZURE = Store(
    name="Azure Blob Storage",
    package="mx-azure",
    order=(
        "`MX_AZURE_ANONYMOUS=1`: requests carry no credentials",
        "`AZURE_STORAGE_CONNECTION_STRING`",
        "`AZURE_STORAGE_ACCOUNT_KEY` or `AZURE_ACCOUNT_KEY`",
        "`AZURE_STORAGE_SAS_TOKEN`",
        "`AZURE_CLIENT_SECRET`, with `AZURE_TENANT_ID` and `AZURE_CLIENT_ID`",
        "`AZURE_CLIENT_CERTIFICATE_PATH`, with the same two",
        "`AZURE_FEDERATED_TOKEN_FILE`, with the same two",
        "DefaultAzureCredential: a managed identity, then developer tools such as `az login`",
    ),
    emulator="Azurite",
    stand_ins=(
        "Entra ID, the metadata service of machines and the program `az`, which give tokens; the Blob service where an "
        "identity lacks a role, since Azurite knows no roles"
    ),
    kinds=(
        Kind(
            "anonymous",
            "`MX_AZURE_ANONYMOUS=1`, for public containers",
            {
                "valid": _loads("emulator"),
                "may not list": _fails(_AZURE_NOT_PUBLIC, "emulator"),
                "may not read": _fails(_AZURE_NOT_PUBLIC, "emulator"),
            },
            doctor=True,
        ),
        Kind(
            "connection string",
            '`AZURE_STORAGE_CONNECTION_STRING="AccountName=...;AccountKey=..."`',
            {
                "valid": _loads("emulator"),
                "missing": _fails(_AZURE_NONE, "no server"),
                "wrong": _fails(_AZURE_WRONG_KEY, "emulator"),
            },
        ),
        Kind(
            "account key",
            "`AZURE_STORAGE_ACCOUNT_NAME=myaccount AZURE_STORAGE_ACCOUNT_KEY=...`",
            {
                "valid": _loads("emulator"),
                "missing": _fails(_AZURE_NONE, "no server"),
                "wrong": _fails(_AZURE_WRONG_KEY, "emulator"),
            },
            doctor=True,
        ),
        Kind(
            "SAS token",
            '`AZURE_STORAGE_ACCOUNT_NAME=myaccount AZURE_STORAGE_SAS_TOKEN="sp=rl&..."`',
            {
                "valid": _loads("emulator"),
                "missing": _fails(_AZURE_NONE, "no server"),
                "wrong": _fails(
                    "the SAS token is for another container or operation, or the firewall of the account does not "
                    "allow this network",
                    "emulator",
                ),
                "expired": _fails("the SAS token ran out, or is not valid yet", "emulator"),
                "may not list": _fails(_AZURE_PERMISSION, "emulator"),
                "may not read": _fails(_AZURE_PERMISSION, "emulator"),
            },
            doctor=True,
        ),
        Kind(
            "service principal with a secret",
            "`AZURE_TENANT_ID=... AZURE_CLIENT_ID=... AZURE_CLIENT_SECRET=...`",
            _azure_identity(
                _fails(_AZURE_NONE, "no server"),
                _fails("the secret is not one of the application"),
                _fails("the secret ran out"),
            ),
            doctor=True,
        ),
        Kind(
            "service principal with a certificate",
            "`AZURE_TENANT_ID=... AZURE_CLIENT_ID=... AZURE_CLIENT_CERTIFICATE_PATH=/etc/keys/loader.pem`",
            _azure_identity(
                _fails(_AZURE_NO_FILE, "no server"), _fails("the certificate is not one of the application")
            ),
        ),
        Kind(
            "workload identity (AKS)",
            "`AZURE_TENANT_ID=... AZURE_CLIENT_ID=... AZURE_FEDERATED_TOKEN_FILE=...`; AKS sets them",
            _azure_identity(
                _fails(_AZURE_NO_FILE, "no server"),
                _fails(
                    "the application has no federated credential for the issuer, subject or audience of the token in "
                    "AZURE_FEDERATED_TOKEN_FILE"
                ),
                _fails("the token in AZURE_FEDERATED_TOKEN_FILE ran out"),
            ),
        ),
        Kind(
            "managed identity of the machine",
            "nothing, if the machine has one identity",
            _azure_identity(_fails(_AZURE_NONE, "no server"), _fails(_AZURE_NO_IDENTITY)),
        ),
        Kind(
            "user-assigned managed identity",
            "`AZURE_CLIENT_ID=...` of the identity",
            _azure_identity(_fails(_AZURE_NONE, "no server"), _fails(_AZURE_NO_IDENTITY)),
            doctor=True,
        ),
        Kind(
            "login of the Azure CLI",
            "`az login`, once",
            {
                **_azure_identity(_fails(_AZURE_NONE, "no server"), _fails(_AZURE_NONE)),
                "expired, and refused again": _fails("the token ran out, and no newer one could be had"),
            },
        ),
    ),
    notes=(
        "An account key allows everything in its account, and does not run out.",
        "`AZURE_TOKEN_CREDENTIALS` selects what DefaultAzureCredential tries: `prod`, `dev`, or the name of one class.",
    ),
)

# -- Hugging Face Hub --------------------------------------------------------------------------------------------------

_HF_GATED_ANONYMOUS = "the repository is gated, and the request carries no token"
_HF_GATED = (
    "the repository is gated, and the account of this token has not been granted access, or the token may not read "
    "gated repositories"
)
_HF_INVALID = "the token was revoked or has run out, or is of another Hub"
_HF_PRIVATE = "the name is misspelt, or the repository is private and this token may not read it"
_HF_PRIVATE_ANONYMOUS = "the name is misspelt, or the repository is private and the request carries no token"

HF = Store(
    name="Hugging Face Hub",
    package="mx-hf",
    order=(
        "`HF_HUB_DISABLE_IMPLICIT_TOKEN=1`: requests carry no token",
        "`HF_TOKEN`",
        "the login of `hf auth login`",
    ),
    emulator="none",
    stand_ins="the Hub and its CDN",
    kinds=(
        Kind(
            "no token",
            "nothing, or `HF_HUB_DISABLE_IMPLICIT_TOKEN=1`, for public repositories",
            {
                "valid": _loads("stand-in"),
                "may not list": _fails(_HF_PRIVATE_ANONYMOUS),
                "may not read": _fails(_HF_GATED_ANONYMOUS),
            },
            doctor=True,
        ),
        Kind(
            "token",
            "`HF_TOKEN=hf_...`",
            {
                "valid": _loads("stand-in"),
                "missing": _fails(_HF_GATED_ANONYMOUS),
                "wrong": _fails(_HF_INVALID),
                "expired, and refused again": _fails(_HF_INVALID),
                "may not list": _fails(_HF_PRIVATE),
                "may not read": _fails(_HF_GATED),
            },
            doctor=True,
        ),
        Kind(
            "login",
            "`hf auth login`, once; or a file in `HF_TOKEN_PATH`",
            {
                "valid": _loads("stand-in"),
                "missing": _fails(_HF_GATED_ANONYMOUS),
                "wrong": _fails(_HF_INVALID),
                "expired, and renewed": _loads("stand-in"),
                "expired, and refused again": _fails(_HF_INVALID),
                "may not list": _fails(_HF_PRIVATE),
                "may not read": _fails(_HF_GATED),
            },
            doctor=True,
        ),
    ),
    notes=(
        "Who may not list: the repository is private. Who may not read: it is gated, and everybody sees its names.",
    ),
)

STORES = (S3, GCS, AZURE, HF)
