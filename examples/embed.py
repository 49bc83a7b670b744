"""Embeds the runtime: `python examples/embed.py build/lenet5 build/digits/eval/7/0035.png` prints the class of the image."""

import sys

import deploy

artifact = deploy.open_artifact(sys.argv[1])
preprocess, classes = artifact.preprocess, artifact.manifest.classes
if preprocess is None:
    sys.exit(f"{sys.argv[1]} was exported without --preprocess")
with deploy.load(artifact) as session:
    logits = session(preprocess.open(sys.argv[2])[None])  # a batch of one image, (1, C, H, W) float32
best = int(logits.argmax())
print(classes[best] if classes else best)
