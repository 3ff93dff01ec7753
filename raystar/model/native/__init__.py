"""Convolutions in C++ for bf16 on a CPU."""
