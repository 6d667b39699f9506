"""The S3 plugin."""
