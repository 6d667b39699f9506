# An example of an image for workers: vLLM with ModelExpress, which reads weights from other workers, or from storage.
# `docker build --file docker/vllm-worker.Dockerfile --tag vllm-modelexpress:0.1.0 .` in a checkout.

# An image of vLLM 0.31 to 0.33 with CUDA 12; vllm/vllm-openai is that of the vLLM project.
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0
# hadolint ignore=DL3006
FROM ${VLLM_IMAGE}

WORKDIR /opt/modelexpress
COPY . .
# PyTorch stays that of the image: pip must not replace it. Remove the storages that you do not read from.
RUN python3 -c "import torch; print('torch==' + torch.__version__)" > /tmp/constraints.txt \
    && python3 -m pip install --no-cache-dir --constraint /tmp/constraints.txt \
        '.[server]' integrations/vllm plugins/mx-grpc-stream 'plugins/mx-nixl[cu12]' \
        plugins/mx-azure plugins/mx-gcs plugins/mx-hf plugins/mx-s3 \
    && rm /tmp/constraints.txt

# Only this plugin of vLLM is loaded, and it reads the weights.
ENV VLLM_PLUGINS=modelexpress
ENTRYPOINT ["vllm", "serve"]
CMD ["--help"]
