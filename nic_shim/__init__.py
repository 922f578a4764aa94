"""Ingress: what stands in for a NIC. Queue-pair port, ZeroMQ server, tokenising and detokenising."""
