"""LitServe and MLServer around the same ONNX file on ONNX Runtime, each as its documentation shows it.

    python serve.py litserve|mlserver MODEL.onnx PORT

LitServe: POST /predict {"input": [...]}; requests that wait are batched, 32 at most. MLServer: POST /v2/models/net/infer; adaptive
batching of 32 at most, both with the delays of their examples.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import litserve as ls
import numpy as np
import onnxruntime

SHAPE = (1, 28, 28)
MOST = 32
DELAY_S = 0.001


def open_model(path: str) -> onnxruntime.InferenceSession:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = len(os.sched_getaffinity(0))
    settings.add_session_config_entry("session.intra_op.spin_duration_us", "100")  # as deploy does
    return onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])


class Net(ls.LitAPI):
    def setup(self, device):
        self.session = open_model(os.environ["MODEL"])

    def decode_request(self, request):
        return np.asarray(request["input"], dtype=np.float32).reshape(SHAPE)

    def batch(self, inputs):
        return np.stack(inputs)

    def predict(self, x):
        return self.session.run(None, {"input": x})[0]

    def unbatch(self, output):
        return list(output)

    def encode_response(self, output):
        return {"output": output.tolist()}


def litserve(model: str, port: int) -> None:
    os.environ["MODEL"] = model
    server = ls.LitServer(Net(max_batch_size=MOST, batch_timeout=DELAY_S), accelerator="cpu")
    server.run(host="127.0.0.1", port=port, log_level="error", generate_client_file=False)


def mlserver(model: str, port: int) -> None:
    folder = Path(tempfile.mkdtemp())
    (folder / "net").mkdir()
    settings = {
        "http_port": port, "grpc_port": port + 1, "metrics_port": port + 2, "host": "127.0.0.1", "parallel_workers": 0, "debug": False,
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    described = {
        "name": "net", "implementation": "runtime.Net", "max_batch_size": MOST, "max_batch_time": DELAY_S, "parameters": {"uri": model},
    }  # fmt: skip
    (folder / "net" / "model-settings.json").write_text(json.dumps(described))
    (folder / "net" / "runtime.py").write_text(RUNTIME)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder / "net"), str(Path(__file__).parent)])
    command = Path(sys.executable).with_name("mlserver")
    os.execv(command, [str(command), "start", str(folder)])


RUNTIME = """
import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse

from serve import open_model


class Net(MLModel):
    async def load(self):
        self.session = open_model(self.settings.parameters.uri)
        return True

    async def predict(self, payload):
        x = NumpyCodec.decode_input(payload.inputs[0]).astype(np.float32)
        (y,) = self.session.run(None, {"input": x})
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("logits", y)])
"""

if __name__ == "__main__":
    tool, model, port = sys.argv[1:]
    {"litserve": litserve, "mlserver": mlserver}[tool](model, int(port))
