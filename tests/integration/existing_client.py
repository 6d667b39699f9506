"""Run by the tests where the client that others have is installed: what it says to a server, as JSON."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from typing import Any

import grpc

# The package's own __init__ imports torch, which these parts of it do not need.
spec: Any = importlib.util.find_spec("modelexpress")
bare = types.ModuleType("modelexpress")
bare.__path__ = list(spec.submodule_search_locations)
sys.modules["modelexpress"] = bare

from modelexpress import p2p_pb2 as theirs  # type: ignore[import-not-found]  # noqa: E402 - see above
from modelexpress.client import MxClient  # type: ignore[import-not-found]  # noqa: E402
from modelexpress.metadata import worker_server  # type: ignore[import-not-found]  # noqa: E402
from modelexpress.metadata.k8s_service_client import MxK8sServiceClient  # type: ignore[import-not-found]  # noqa: E402

from modelexpress_core.contracts.identity import Engine, SourceIdentity  # noqa: E402 - both in one process
from modelexpress_core.sources.client import ServerClient  # noqa: E402 - both in one process
from modelexpress_core.wire.identities import identity_to_message  # noqa: E402
from modelexpress_core.wire.proto.modelexpress import p2p_pb2 as ours  # noqa: E402

url, endpoint = sys.argv[1:]
client = MxClient(url)
identity = theirs.SourceIdentity(
    mx_version="0.5.0",
    model_name="deepseek-ai/DeepSeek-V3",
    backend_framework=theirs.BACKEND_FRAMEWORK_VLLM,
    tensor_parallel_size=8,
    pipeline_parallel_size=1,
    dtype="bfloat16",
)
tensor = theirs.TensorDescriptor(name="w", addr=2**60, size=4096, device_id=1, dtype="bfloat16")
worker = theirs.WorkerMetadata(
    worker_rank=3,
    nixl_metadata=b"\0agent\xff",
    tensors=[tensor],
    status=theirs.SOURCE_STATUS_INITIALIZING,
    accelerator="cuda",
    topology={"rack": "7"},
)
worker.tensor_source.tensors.append(tensor)
source_id = client.publish_metadata(identity, worker, "w-1")
answers: dict[str, Any] = {"source_id": source_id}
answers["ready before"] = [
    each.worker_id for each in client.list_sources(identity, theirs.SOURCE_STATUS_READY).instances
]
answers["updated"] = client.update_status(source_id, "w-1", 3, theirs.SOURCE_STATUS_READY, 0.25)
answers["updated another"] = client.update_status(source_id, "nobody", 3, theirs.SOURCE_STATUS_READY)
[listed] = client.list_sources(identity, theirs.SOURCE_STATUS_READY).instances
answers["listed"] = [listed.worker_id, listed.worker_rank, listed.source_load, dict(listed.topology)]
found = client.get_metadata(source_id, "w-1")
worker.status = theirs.SOURCE_STATUS_READY
worker.updated_at = found.worker.updated_at
answers["found all"] = found.found and found.worker == worker and found.identity == identity
answers["found another"] = client.get_metadata(source_id, "nobody").found

with ServerClient.from_env(url=url) as mine:
    same = SourceIdentity(
        "deepseek-ai/DeepSeek-V3",
        mx_version="0.5.0",
        backend_framework=Engine.VLLM,
        tensor_parallel_size=8,
        dtype="bfloat16",
    )
    answers["seen by us"] = [
        source.worker_id for source in mine.list_sources(ours.ListSourcesRequest(identity=identity_to_message(same)))
    ]
    mine.publish(same, ours.WorkerMetadata(status=ours.SOURCE_STATUS_READY), "w-2")
answers["seen by them"] = sorted(each.worker_id for each in client.list_sources(identity).instances)
client.close()
lease, _ = worker_server.prepare_tensor_read(endpoint, source_id, worker_id="w-1")
answers["read from a worker"] = [tensor.name for tensor in lease.manifest.tensors]
lease.release()
answers["manifest"] = len(worker_server.fetch_tensor_manifest(endpoint, source_id)[0])
behind_service = MxK8sServiceClient(worker_rank=0, service_pattern=endpoint, max_retries=0)
[instance] = behind_service.list_sources(identity).instances
through_service = behind_service.get_metadata(instance.mx_source_id, instance.worker_id)
answers["through a service"] = [
    through_service.mx_source_id,
    [tensor.name for tensor in through_service.worker.tensor_source.tensors],
]
try:
    worker_server.fetch_tensor_manifest(endpoint, "0" * 16)
except grpc.RpcError as exc:
    answers["another source"] = exc.code().name
sys.stdout.write(json.dumps(answers) + "\n")
