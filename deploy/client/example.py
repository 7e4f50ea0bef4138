"""Streams a text from dejavud as any client should: with the published service config, a deadline, and one more attempt
after a stream that broke. Stubs first, from the root of the repository:

    python -m grpc_tools.protoc -I proto --python_out=. --grpc_python_out=. dejavu/v1/generation.proto
    PYTHONPATH=. python deploy/client/example.py dns:///dejavud.default.svc:50051 "It was a dark night, and"

TLS: --ca ca.crt, with --cert and --key where the server asks for a certificate. A token: --token-file token.
"""
import argparse
import pathlib
import sys

import grpc
from dejavu.v1 import generation_pb2, generation_pb2_grpc

parser = argparse.ArgumentParser()
parser.add_argument("target")
parser.add_argument("prompt")
parser.add_argument("--ca", type=pathlib.Path)
parser.add_argument("--cert", type=pathlib.Path)
parser.add_argument("--key", type=pathlib.Path)
parser.add_argument("--token-file", type=pathlib.Path)
args = parser.parse_args()


def read(path):
    return path.read_bytes() if path else None


options = [
    # round_robin over the replicas that are healthy, retries of what was refused: see service-config.json.
    ("grpc.service_config", (pathlib.Path(__file__).parent / "service-config.json").read_text()),
    ("grpc.keepalive_time_ms", 30_000),  # finds dead connections under long streams; dejavud takes one in 10 s
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_reconnect_backoff_ms", 1_000),  # a replica that restarts is used soon
]
if args.ca:
    credentials = grpc.ssl_channel_credentials(read(args.ca), read(args.key), read(args.cert))
    channel = grpc.secure_channel(args.target, credentials, options)
else:
    channel = grpc.insecure_channel(args.target, options)
metadata = [("authorization", f"Bearer {args.token_file.read_text().strip()}")] if args.token_file else []
stub = generation_pb2_grpc.GenerationServiceStub(channel)

request = generation_pb2.GenerateRequest(text=args.prompt)
request.stopping.max_new_tokens = 40
request.sampling.seed = 7  # with a seed the second attempt says what the first one would have said
for attempt in (1, 2):
    text = ""
    try:
        for chunk in stub.GenerateStream(request, metadata=metadata, timeout=60):
            text += chunk.text
        break
    except grpc.RpcError as error:
        # gRPC retries no stream that has begun: whoever lost tokens asks again.
        if attempt == 2 or not text or error.code() != grpc.StatusCode.UNAVAILABLE:
            sys.exit(f"{error.code().name}: {error.details()}")
print(text)
