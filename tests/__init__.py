"""Tests, in folders by what they need: null (nothing), compile (g++, NVRTC), host (native library, processes), gpu (a CUDA GPU)."""
