"""The protocol's messages are those of Triton, and compiled from the files beside them."""

from pathlib import Path
from typing import Any

import deploy
from deploy.serving.grpc_door import SERVICE
from deploy.serving.grpc_messages import POOL


def test_our_messages_have_the_names_and_numbers_of_tritons() -> None:
    from tritonclient.grpc import model_config_pb2, service_pb2

    theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    compared = 0

    def compare(ours: Any, other: Any) -> None:
        nonlocal compared
        for field in ours.fields:
            wanted = other.fields_by_name[field.name]
            assert (field.number, field.type, field.is_repeated) == (wanted.number, wanted.type, wanted.is_repeated), (
                field.full_name
            )
            compared += 1
            if field.enum_type:
                numbers = {value.name: value.number for value in wanted.enum_type.values}
                assert {value.name: value.number for value in field.enum_type.values}.items() <= numbers.items()
            if field.message_type and field.message_type.name not in seen:
                seen.add(field.message_type.name)
                compare(field.message_type, wanted.message_type)

    seen: set[str] = set()
    for method in POOL.FindServiceByName(SERVICE).methods:
        compare(method.input_type, theirs.methods_by_name[method.name].input_type)
        compare(method.output_type, theirs.methods_by_name[method.name].output_type)
    assert compared > 100
    assert model_config_pb2.DESCRIPTOR


def test_the_descriptors_are_compiled_from_the_protocol_files(tmp_path: Path) -> None:
    from grpc_tools import protoc

    folder = Path(deploy.__file__).parent / "serving"
    made = tmp_path / "made.binpb"
    assert (
        protoc.main(["", f"-I{folder}", f"--descriptor_set_out={made}", f"{folder}/inference.proto", f"{folder}/health.proto"])
        == 0
    )
    assert made.read_bytes() == (folder / "protocols.binpb").read_bytes(), "run `make proto`"
