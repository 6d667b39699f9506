"""The contracts: what plugin authors implement, and the records and requests that travel through it.

| module | contract |
|---|---|
| ``storage`` | reads byte ranges of the files of a checkpoint |
| ``transport`` | reads tensors from the memory of a worker |
| ``discovery`` | finds the workers and places that hold a model |
| ``metadata_store`` | keeps the metadata of a server |
| ``service`` | a gRPC service of a server |
| ``authenticator`` | authenticates the calls that a server answers |
| ``candidates`` | the request of a load, and the places that it may read from |
| ``identity`` | what makes the weights of two workers interchangeable |

Importing them imports neither torch nor gRPC nor an SDK.
"""
