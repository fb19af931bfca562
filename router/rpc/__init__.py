"""The messages of gRPC: `baton_v1.proto`, and what scripts/grpc_code.py generates from it."""
