# The image of the server: `docker build --file docker/server.Dockerfile --tag modelexpress-server:0.1.0 .` in a checkout.
# It holds the versions of uv.lock, checked by their hashes, and no PyTorch, which only workers need.

FROM python:3.12-slim-bookworm AS build

WORKDIR /source
# hadolint ignore=DL3042
RUN python -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir "uv>=0.9,<1"
COPY . .
# Storages that the cache downloads from, metadata in custom resources, and spans.
RUN /opt/uv/bin/uv export --frozen --no-dev --no-emit-workspace --prune torch --output-file /requirements.txt \
        --extra server --extra azure --extra gcs --extra grpc --extra hf --extra kubernetes --extra s3 --extra otel \
    && python -m venv /opt/modelexpress \
    && /opt/modelexpress/bin/pip install --no-cache-dir --require-hashes --requirement /requirements.txt \
    && /opt/modelexpress/bin/pip install --no-cache-dir --no-deps \
        . plugins/mx-azure plugins/mx-gcs plugins/mx-grpc-stream plugins/mx-hf plugins/mx-kubernetes plugins/mx-s3

FROM python:3.12-slim-bookworm

LABEL org.opencontainers.image.title="ModelExpress server" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/modelexpress /opt/modelexpress
ENV PATH=/opt/modelexpress/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
# The chart runs the same user, and gives it the volumes.
RUN useradd --uid 10001 --no-create-home --home-dir /tmp modelexpress
USER 10001:10001
EXPOSE 8001 8002 8003 9401
ENTRYPOINT ["mx"]
CMD ["serve"]
