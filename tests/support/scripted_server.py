"""A gRPC server of Triton's protocol that follows a script: what a healthy one cannot be made to do."""

import threading
from concurrent import futures
from contextlib import contextmanager

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import serialize_byte_tensor


def piece(text, *, last=False):
    """One response of a single sequence, as Triton sends it."""
    message = service_pb2.ModelStreamInferResponse()
    response = message.infer_response
    response.parameters["triton_final_response"].bool_param = last
    values = {"text_output": ("BYTES", [text]), "output_ids": ("INT32", [1]), "sequence_index": ("INT32", [0])}
    if last:
        values["finish_reason"] = ("BYTES", ["stop"])
        for name in ("num_input_tokens", "num_output_tokens", "total_accepted_draft_tokens", "total_draft_tokens"):
            values[name] = ("INT32", [1])
        values["total_verified_draft_tokens"] = values["num_rounds"] = ("INT32", [1])
        for name in ("arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns"):
            values[name] = ("INT64", [1])
    for name, (datatype, items) in values.items():
        response.outputs.add(name=name, datatype=datatype, shape=[len(items)])
        raw = (
            serialize_byte_tensor(np.array([item.encode() for item in items], dtype=object)).item()
            if datatype == "BYTES"
            else np.array(items, dtype={"INT32": np.int32, "INT64": np.int64}[datatype]).tobytes()
        )
        response.raw_output_contents.append(raw)
    return message


def error(text):
    return service_pb2.ModelStreamInferResponse(error_message=text)


class Scripted(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Plays script after script, one a stream: messages to send, a status to abort with, or seconds to hang."""

    def __init__(self, scripts):
        self.scripts = list(scripts)
        self.requests = []
        self.metadata = []
        self.cancelled = threading.Event()
        self.asked = threading.Event()

    def ServerReady(self, request, context):
        """Asked something that is no stream, it hangs."""
        self.asked.set()
        self.cancelled.wait(30)

    ModelStatistics = ServerReady

    def ModelStreamInfer(self, request_iterator, context):
        context.add_callback(lambda: None if context.code() else self.cancelled.set())
        self.requests += list(request_iterator)
        self.metadata.append(dict(context.invocation_metadata()))
        for step in self.scripts.pop(0):
            if isinstance(step, grpc.StatusCode):
                context.abort(step, "scripted")
            elif isinstance(step, float):
                self.cancelled.wait(step)
            else:
                yield step


@contextmanager
def serving(*scripts, credentials=None):
    """Serves one script a stream; yields the server's record and its address."""
    script = Scripted(scripts)
    server = grpc.server(futures.ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(script, server)
    port = (
        server.add_secure_port("localhost:0", credentials) if credentials else server.add_insecure_port("localhost:0")
    )
    server.start()
    try:
        yield script, f"localhost:{port}"
    finally:
        script.cancelled.set()
        server.stop(None).wait()
