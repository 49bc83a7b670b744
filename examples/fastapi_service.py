"""Your own service: a deploy session and its batcher in a FastAPI application, for a classifier of images.

MODEL=build/convnet-int8 uvicorn examples.fastapi_service:app --timeout-graceful-shutdown 20
curl --data-binary @digit.png localhost:8000/classify; curl localhost:8000/health"""

import os
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request

import deploy
from deploy.errors import DataError, DeadlineError, QueueFullError

artifact = deploy.open_artifact(os.environ["MODEL"])  # exported with --preprocess
prepare, classes, most_bytes = artifact.preprocess, artifact.manifest.classes, 8 << 20


@asynccontextmanager
async def lifespan(app: FastAPI):
    with deploy.load(artifact) as session, deploy.Batcher(session, deploy.BatcherOptions(queue_rows=256)) as app.state.batcher:
        (app.state.input,), (app.state.output,) = session.inputs, session.outputs
        yield  # before it, uvicorn accepts nothing; after it, what waits is answered


app = FastAPI(lifespan=lifespan)
app.get("/health")(lambda: {"model": artifact.manifest.name, "waiting": app.state.batcher.waiting})


@app.post("/classify")
async def classify(request: Request) -> dict[str, object]:
    if int(request.headers.get("content-length", most_bytes + 1)) > most_bytes:
        raise HTTPException(413, f"Content-Length must be there, and {most_bytes:,} at most")
    try:
        feed = {app.state.input.name: prepare.open(await request.body())[None]}
        outputs = await app.state.batcher.run_async(feed, timeout_s=1)
    except (DataError, QueueFullError, DeadlineError) as error:
        raise HTTPException(400 if isinstance(error, DataError) else 503, str(error)) from error
    best = outputs[app.state.output.name][0].argmax().item()
    return {"class": classes[best] if classes else best}
