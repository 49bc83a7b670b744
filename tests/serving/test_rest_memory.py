"""System shared memory over both doors, with Triton's own client and utilities."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
import tritonclient.utils.shared_memory as memory
from tritonclient.utils import InferenceServerException

import deploy
from deploy.artifact.artifact import Artifact

from .conftest import Server

KEY = f"/deploy_doors_{os.getpid()}"
X = np.random.default_rng(0).standard_normal((2, 1, 28, 28), dtype=np.float32)
OUT = X.nbytes
"""Where the outputs begin."""


@pytest.fixture(scope="module")
def server(shared_lenet5: Artifact) -> Iterator[Server]:
    started = Server([f"digits={shared_lenet5.path}", "--shared-memory"])
    yield started
    started.kill()


@pytest.fixture(params=["http", "grpc"])
def door(request: pytest.FixtureRequest, server: Server) -> Iterator[tuple[Any, Any]]:
    module = http_client if request.param == "http" else grpc_client
    with module.InferenceServerClient(getattr(server, request.param)) as client:
        yield module, client
        client.unregister_system_shared_memory()


@pytest.fixture
def handle() -> Iterator[Any]:
    made = memory.create_shared_memory_region("object", KEY, OUT + 80, create_only=True)
    memory.set_shared_memory_region(made, [X])
    yield made
    memory.destroy_shared_memory_region(made)


def place_input(module: Any, size: int = X.nbytes, offset: int = 0) -> Any:
    made = module.InferInput("input", list(X.shape), "FP32")
    made.set_shared_memory("in", size, offset)
    return made


def place_output(module: Any, size: int = 80, offset: int = 0) -> Any:
    made = module.InferRequestedOutput("logits")
    made.set_shared_memory("out", size, offset)
    return made


def test_tensors_are_read_from_and_written_into_registered_regions(door: Any, handle: Any, shared_lenet5: Artifact) -> None:
    module, client = door
    client.register_system_shared_memory("in", KEY, X.nbytes)
    client.register_system_shared_memory("out", KEY, 80, offset=OUT)
    status = client.get_system_shared_memory_status(**({"as_json": True} if module is grpc_client else {}))
    listed = status if isinstance(status, list) else list(status["regions"].values())
    assert {(region["name"], region["key"], int(region["byte_size"])) for region in listed} == {
        ("in", KEY, X.nbytes), ("out", KEY, 80),
    }  # fmt: skip
    result = client.infer("digits", [place_input(module)], outputs=[place_output(module)])
    found = memory.get_contents_as_numpy(handle, np.float32, [2, 10], offset=OUT).copy()
    with deploy.load(shared_lenet5) as session:
        np.testing.assert_allclose(found, session(X), rtol=1e-5, atol=1e-6)
    output = result.get_output("logits")
    parameters = output["parameters"] if isinstance(output, dict) else output.parameters
    size = parameters["shared_memory_byte_size"]
    assert (size if isinstance(size, int) else size.int64_param) == 80
    plain = client.infer("digits", [place_input(module)]).as_numpy("logits")
    np.testing.assert_array_equal(plain, found)


def test_places_outside_a_region_and_unknown_regions_are_refused(door: Any, handle: Any) -> None:
    module, client = door
    with pytest.raises(InferenceServerException, match="no region 'in'"):
        client.infer("digits", [place_input(module)])
    client.register_system_shared_memory("in", KEY, X.nbytes)
    client.register_system_shared_memory("out", KEY, 80, offset=OUT)
    for given, wanted in (
        (place_input(module, offset=8), place_output(module)),
        (place_input(module), place_output(module, offset=8)),
        (place_input(module), place_output(module, size=72)),
        (place_input(module, size=X.nbytes - 4), place_output(module)),
    ):
        with pytest.raises(InferenceServerException, match=r"not inside region|bytes of data|were set aside"):
            client.infer("digits", [given], outputs=[wanted])
    with pytest.raises(InferenceServerException, match="would end at byte"):
        client.register_system_shared_memory("large", KEY, OUT + 81)
    with pytest.raises(InferenceServerException, match="registered already"):
        client.register_system_shared_memory("in", KEY, 8)


def test_shared_memory_of_cuda_is_refused_and_there_is_none(door: Any) -> None:
    _, client = door
    status = client.get_cuda_shared_memory_status()
    assert not (status if isinstance(status, list) else status.regions)
    client.unregister_cuda_shared_memory()
    with pytest.raises(InferenceServerException, match="CUDA shared memory is not taken"):
        client.register_cuda_shared_memory("r", b"AAAA", 0, 8)


def test_the_extension_is_named_where_it_is_on(server: Server, limited: Server) -> None:
    for each, is_on in ((server, True), (limited, False)):
        with http_client.InferenceServerClient(each.http) as client:
            assert ("system_shared_memory" in client.get_server_metadata()["extensions"]) == is_on
    refused = pytest.raises(InferenceServerException, match="--shared-memory")
    with http_client.InferenceServerClient(limited.http) as client, refused:
        client.register_system_shared_memory("r", KEY, 8)
