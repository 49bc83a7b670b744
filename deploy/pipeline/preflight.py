"""What TensorRT's parser makes of a typed graph, before an engine is built."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from deploy.artifact.manifest import ONNX, PrecisionShare
from deploy.artifact.tensors import Profile
from deploy.engine.attestation import check_honoured, network_share
from deploy.engine.flavour import Flavour
from deploy.engine.network import parse_network
from deploy.pipeline.attest import optimum
from deploy.pipeline.typed import Typed
from deploy.precision.macs import count_macs
from deploy.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """A graph that the parser takes: the number of its nodes, and the share of its multiply-accumulates in each precision."""

    flavour: str
    version: str
    nodes: int
    share: PrecisionShare


def check_parser(typed: Typed, flavour: Flavour, profiles: list[Profile], progress: Progress) -> Preflight:
    """Let the parser read `typed`; nothing is built or written.

    Raises EngineError listing every node that the parser refuses, by its ONNX name, with the reason and a remedy, and when
    the precision asked for is not honoured.
    """
    shown = typed.source.shown
    with tempfile.TemporaryDirectory(prefix="deploy-") as folder:
        path = Path(folder, ONNX)
        typed = typed.saved(path)
        progress("parsing")
        network = parse_network(flavour, path, shown=shown)
        model = ir.load(path)
        macs = count_macs(model, optimum(profiles))
        share, by_node = network_share(network.definition, flavour.trt, macs)
        nodes = len(model.graph)
    check_honoured(typed.manifest.precision, by_node, macs, typed.manifest.exclusions, f"{shown} with {flavour.name}")
    return Preflight(flavour=flavour.name, version=flavour.version, nodes=nodes, share=share)
