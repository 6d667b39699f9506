"""Values of the chart that tests render: each combination that it offers, and each that it refuses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["APIS", "CASES", "REFUSED", "VERSIONS", "below"]

#: Versions of Kubernetes whose schemas the objects are checked against, with the APIs that they have by default.
VERSIONS: Mapping[str, tuple[str, ...]] = {
    "1.27": (),
    "1.32": (),
    "1.37": ("admissionregistration.k8s.io/v1/MutatingAdmissionPolicy",),
}

#: APIs of others that the rendered cluster has.
APIS = ("monitoring.coreos.com/v1", "cert-manager.io/v1")

_REDIS = {"metadata": {"store": "redis", "redis": {"url": "redis://redis:6379/0"}}}
_TLS = {"tls": {"enabled": True, "secret": "server-tls"}}
_CA = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"


def _merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
            merged[key] = _merged(merged[key], value) if both else value
    return merged


CASES: Mapping[str, dict[str, Any]] = {
    "defaults": {},
    "other names": {"fullnameOverride": "weights", "clusterDomain": "example.org"},
    "no cache": {"cache": {"enabled": False}},
    "a claim": {"cache": {"volume": "claim", "size": "2Ti", "storageClass": "fast", "accessMode": "ReadWriteMany"}},
    "a claim that exists": {"cache": {"volume": "existingClaim", "existingClaim": "models", "maxBytes": "1Ti"}},
    "a directory of the node": {"cache": {"volume": "hostPath", "prepareHostPath": True, "size": "500Mi"}},
    "replicas with redis": _merged(_REDIS, {"workload": {"replicas": 3}}),
    "redis by secret": {"metadata": {"store": "redis", "redis": {"secret": "redis", "secretKey": "address"}}},
    "custom resources": {"metadata": {"store": "kubernetes"}, "workload": {"replicas": 2}},
    "custom resources of others": {
        "metadata": {"store": "kubernetes"},
        "crds": {"install": False},
        "rbac": {"create": False},
        "serviceAccount": {"create": False, "name": "prepared"},
    },
    "a volume for each replica": _merged(
        _REDIS, {"workload": {"kind": "statefulset", "replicas": 3}, "cache": {"volume": "claim"}}
    ),
    "a cache on each node": _merged(
        _REDIS,
        {
            "workload": {"kind": "daemonset"},
            "cache": {"volume": "hostPath"},
            "nodeSelector": {"gpu": "true"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        },
    ),
    "TLS from a secret": _merged(_TLS, {"tls": {"clientCa": {"pem": _CA}}}),
    "TLS from cert-manager": {
        "tls": {
            "enabled": True,
            "certManager": {"enabled": True, "issuer": "ca", "issuerKind": "ClusterIssuer", "extraDnsNames": ["mx.x"]},
            "clientCa": {"configMap": "bundle", "key": "root.pem"},
        }
    },
    "tokens": _merged(
        _TLS,
        {
            "auth": {
                "mode": "token",
                "token": {"secret": "callers"},
                "rights": [{"names": ["trainer-*"], "models": ["acme/*"], "allow": ["publish", "read"]}],
            },
            "credentials": {"secrets": ["hub", "aws"], "googleKeySecret": "gcs"},
            "config": {"cache": {"sources": ["hf", "s3://models-*"]}},
        },
    ),
    "tokens in plain text between replicas": _merged(
        _REDIS,
        {
            "workload": {"kind": "statefulset", "replicas": 2},
            "auth": {
                "mode": "token",
                "acceptPlaintextTokens": True,
                "token": {"secret": "callers", "ownSecret": "own"},
            },
        },
    ),
    "certificates of callers": _merged(_TLS, {"auth": {"mode": "mtls", "mtls": {"caSecret": "callers"}}}),
    "certificates of one authority": _merged(_TLS, {"tls": {"secretHasCa": True}, "auth": {"mode": "mtls"}}),
    "tokens of service accounts": {
        "metadata": {"store": "kubernetes"},
        "workload": {"kind": "statefulset", "replicas": 3},
        "cache": {"volume": "claim"},
        "tls": {"enabled": True, "certManager": {"enabled": True, "issuer": "ca"}, "clientCa": {"configMap": "ca"}},
        "auth": {"mode": "kubernetes", "kubernetes": {"serviceAccounts": ["vllm:worker"]}},
    },
    "identity in AWS": {
        "credentials": {
            "workloadIdentity": {"awsRoleArn": "arn:aws:iam::1:role/mx"},
            "acceptAnonymousCallers": True,
        }
    },
    "identity in Google Cloud": {
        "credentials": {"workloadIdentity": {"gcpServiceAccount": "mx@p.example"}, "acceptAnonymousCallers": True}
    },
    "identity in Azure": {
        "credentials": {"workloadIdentity": {"azureClientId": "1234"}, "acceptAnonymousCallers": True}
    },
    "Istio": {"mesh": {"kind": "istio", "tensorParallelSize": 2}},
    "Linkerd": {"mesh": {"kind": "linkerd", "tensorParallelSize": 8}},
    "everything else": {
        "image": {"repository": "images.example/mx", "digest": f"sha256:{'0' * 64}", "pullSecrets": ["pull"]},
        "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
        "serviceAccount": {"annotations": {"c": "d"}},
        "client": {"env": {"MODEL_EXPRESS_NO_SHARED_STORAGE": "1"}},
        "metrics": {
            "tokenSecret": "metrics",
            "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "dashboard": {"enabled": True, "annotations": {"folder": "models"}},
        },
        "networkPolicy": {
            "enabled": True,
            "clients": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "vllm"}}}],
            "metrics": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
            "egress": [{"to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.169.254/32"]}}]}],
        },
        "probes": {"startupSeconds": 31, "periodSeconds": 5},
        "drainSeconds": 120,
        "deregistrationSeconds": 0,
        "listenAddress": "[::]",
        "commonLabels": {"team": "serving"},
        "podLabels": {"pod": "label"},
        "podAnnotations": {"pod": "annotation"},
        "priorityClassName": "high",
        "affinity": {"nodeAffinity": {}},
        "extraEnv": [{"name": "HF_ENDPOINT", "value": "https://hub.example"}],
        "extraVolumes": [{"name": "data", "emptyDir": {}}],
        "extraVolumeMounts": [{"name": "data", "mountPath": "/data"}],
        "extraObjects": [
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "{{ .Release.Name }}-more"}},
            "apiVersion: v1\nkind: Secret\nmetadata: {name: '{{ .Chart.Name }}-text'}\n",
        ],
        "config": {
            "heartbeat_timeout_seconds": "120s",
            "reaper_interval_seconds": 15,
            "cache": {"sources": ["hf"], "min_free_bytes": "20GiB", "may_delete": True},
            "limits": {"records_bytes": "4GiB", "entries": 1000},
            "log": {"level": "debug", "format": "json"},
        },
    },
}

_ACCOUNTS = {"auth": {"mode": "kubernetes", "kubernetes": {"serviceAccounts": ["vllm:worker"]}}}

#: Values that the chart refuses, and words of the message: what is wrong, and what to do.
REFUSED: Mapping[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "three replicas with memory": (
        {"workload": {"replicas": 3}},
        ("workload.replicas is 3", "metadata.store is memory", "Set metadata.store to redis or kubernetes"),
    ),
    "a daemonset with memory": (
        {"workload": {"kind": "daemonset"}},
        ("workload.kind is daemonset", "Set metadata.store to redis or kubernetes"),
    ),
    "replicas of a daemonset": (
        _merged(_REDIS, {"workload": {"kind": "daemonset", "replicas": 2}}),
        ("workload.replicas is 2", "one replica on each node", "Leave workload.replicas at 1"),
    ),
    "a shared claim": (
        _merged(_REDIS, {"workload": {"replicas": 2}, "cache": {"volume": "claim", "accessMode": "ReadWriteMany"}}),
        ("cache.volume is claim", "one server at a time", "Set workload.kind to statefulset"),
    ),
    "a shared claim that exists": (
        _merged(
            _REDIS,
            {
                "workload": {"kind": "statefulset", "replicas": 2},
                "cache": {"volume": "existingClaim", "existingClaim": "models"},
            },
        ),
        ("cache.volume is existingClaim", "cache.volume=claim"),
    ),
    "a claim without a name": ({"cache": {"volume": "existingClaim"}}, ("cache.existingClaim is empty", "Set it")),
    "a claim that is not used": (
        {"cache": {"existingClaim": "models"}},
        ("cache.volume is emptyDir", "Set cache.volume to existingClaim"),
    ),
    "a directory that is not the node's": (
        {"cache": {"prepareHostPath": True}},
        ("cache.prepareHostPath is true", "Set cache.volume to hostPath"),
    ),
    "redis without an address": ({"metadata": {"store": "redis"}}, ("where Redis is", "Set metadata.redis.url")),
    "redis with two addresses": (
        {"metadata": {"store": "redis", "redis": {"url": "redis://r", "secret": "s"}}},
        ("both set", "Remove one"),
    ),
    "redis that is not used": (
        {"metadata": {"redis": {"url": "redis://r"}}},
        ("metadata.store is memory", "Set metadata.store to redis"),
    ),
    "a password in values": (
        {"metadata": {"store": "redis", "redis": {"url": "redis://user:password@redis"}}},
        ("/metadata/redis/url", "does not match pattern"),
    ),
    "TLS without a certificate": ({"tls": {"enabled": True}}, ("no certificate", "Set tls.secret")),
    "a certificate without TLS": ({"tls": {"secret": "x"}}, ("plain text", "Set tls.enabled to true")),
    "two certificates": (
        _merged(_TLS, {"tls": {"certManager": {"enabled": True, "issuer": "ca"}}}),
        ("both set", "Remove one"),
    ),
    "no issuer": (
        {"tls": {"enabled": True, "certManager": {"enabled": True}}},
        ("tls.certManager.issuer is empty", "Set it"),
    ),
    "two authorities": (
        _merged(_TLS, {"tls": {"clientCa": {"pem": _CA, "configMap": "c"}}}),
        ("both set", "Remove one"),
    ),
    "tokens in plain text": (
        {"auth": {"mode": "token", "token": {"secret": "callers"}}},
        ("plain text", "auth.acceptPlaintextTokens"),
    ),
    "tokens of service accounts in plain text": (_ACCOUNTS, ("auth.mode is kubernetes", "auth.acceptPlaintextTokens")),
    "tokens without a list": (_merged(_TLS, {"auth": {"mode": "token"}}), ("auth.token.secret is empty", "Set it")),
    "tokens that are not used": ({"auth": {"token": {"secret": "callers"}}}, ("no effect", "Set auth.mode to token")),
    "replicas without a token": (
        _merged(
            _REDIS,
            _TLS,
            {
                "workload": {"kind": "statefulset", "replicas": 2},
                "auth": {"mode": "token", "token": {"secret": "callers"}},
            },
        ),
        ("replicas read from each other", "Set auth.token.ownSecret"),
    ),
    "certificates without TLS": ({"auth": {"mode": "mtls"}}, ("no certificates without TLS", "Set tls.enabled")),
    "certificates of no authority": (
        _merged(_TLS, {"auth": {"mode": "mtls"}}),
        ("no authority", "Set auth.mtls.caSecret"),
    ),
    "an authority that is not used": (
        {"auth": {"mtls": {"caSecret": "callers"}}},
        ("no caller would need a certificate", "Set auth.mode to mtls"),
    ),
    "no service accounts": (
        _merged(_TLS, {"auth": {"mode": "kubernetes"}}),
        ("nobody would be answered", "List namespace:name"),
    ),
    "service accounts that are not used": (
        {"auth": {"kubernetes": {"serviceAccounts": ["a:b"]}}},
        ("no effect", "Set auth.mode to kubernetes"),
    ),
    "rights of nobody": (
        {"auth": {"rights": [{"names": ["*"], "allow": ["read"]}]}},
        ("every caller would be answered", "Set auth.mode"),
    ),
    "credentials for everybody": (
        {"credentials": {"secrets": ["hub"]}},
        ("every pod that reaches the server", "credentials.acceptAnonymousCallers"),
    ),
    "an identity for everybody": (
        {"credentials": {"workloadIdentity": {"azureClientId": "1"}}},
        ("every pod that reaches the server", "Set auth.mode"),
    ),
    "two identities": (
        {"credentials": {"workloadIdentity": {"azureClientId": "1", "awsRoleArn": "arn:x"}}},
        ("pods run in one cloud", "Keep one"),
    ),
    "an identity for an account of others": (
        {
            "credentials": {"workloadIdentity": {"azureClientId": "1"}, "acceptAnonymousCallers": True},
            "serviceAccount": {"create": False},
        },
        ("cannot annotate", "Annotate it yourself"),
    ),
    "credentials without a cache": (
        {"credentials": {"secrets": ["hub"], "acceptAnonymousCallers": True}, "cache": {"enabled": False}},
        ("downloads nothing", "set cache.enabled to true"),
    ),
    "no rights at the API server": (
        {"metadata": {"store": "kubernetes"}, "rbac": {"create": False}},
        ("nothing gives rights", "Set serviceAccount.name"),
    ),
    "a variable that the chart sets": (
        {"extraEnv": [{"name": "MODEL_EXPRESS_SERVER_PORT", "value": "1"}]},
        ("extraEnv sets MODEL_EXPRESS_SERVER_PORT", "Use the value"),
    ),
    "a client variable that the chart sets": (
        {"client": {"env": {"MODEL_EXPRESS_URL": "x"}}},
        ("client.env sets MODEL_EXPRESS_URL", "Remove it"),
    ),
    "injection without the API": (
        {"injection": {"enabled": True}},
        ("no MutatingAdmissionPolicy", "Set injection.enabled to false"),
    ),
    "a value that does not exist": ({"replicas": 3}, ("additional properties 'replicas' not allowed",)),
    "a value below that does not exist": (
        {"cache": {"sized": "1Gi"}},
        ("at '/cache'", "additional properties 'sized' not allowed"),
    ),
    "a setting that does not exist": (
        {"config": {"cache": {"max_idle": 1}}},
        ("at '/config/cache'", "additional properties 'max_idle' not allowed"),
    ),
    "a setting that the chart owns": (
        {"config": {"port": 9000}},
        ("at '/config'", "additional properties 'port' not allowed"),
    ),
    "a word that YAML takes for no": ({"auth": {"mode": False}}, ("at '/auth/mode'",)),
    "a size without a unit": ({"cache": {"size": "100"}}, ("at '/cache/size'", "does not match pattern")),
}


def below(prefix: str, schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each object and list item of a JSON schema, with its path."""
    yield prefix, schema
    for name, part in schema.get("properties", {}).items():
        yield from below(f"{prefix}.{name}" if prefix else name, part)
    if isinstance(schema.get("items"), Mapping):
        yield from below(f"{prefix}[]", schema["items"])
