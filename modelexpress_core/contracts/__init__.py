"""The contracts that plugin authors implement, and the records that travel through them.

| module | contract |
|---|---|
| ``storage`` | reads byte ranges of the files of a checkpoint |
| ``transport`` | reads tensors from the memory of a worker |
| ``discovery`` | finds the workers and places that hold a model |
| ``metadata_store`` | keeps the metadata of a server |
| ``service`` | answers the calls of a gRPC service of a server |
| ``authenticator`` | names the callers of servers and workers |
| ``candidates`` | the request of a load, and the places that it may read from |
| ``identity`` | the identity of weights in memory; workers of one identity can read from each other |

Importing them imports neither torch nor gRPC nor an SDK.
"""
