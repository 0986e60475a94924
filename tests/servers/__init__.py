"""Tests against real servers on a CPU: ``make test-vllm``."""
