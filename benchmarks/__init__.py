"""Figures of ModelExpress beside others, each as a ratio that one run measured: ``python -m benchmarks``."""
