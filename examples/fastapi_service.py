"""Your own service: a deploy session and its batcher inside a FastAPI application.

pip install 'deploy[cpu]' fastapi uvicorn
MODEL=build/convnet-int8 uvicorn examples.fastapi_service:app
curl --data-binary @digit.png localhost:8000/classify
"""

import os
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request

import deploy
from deploy import Batcher, BatcherOptions
from deploy.errors import DataError, QueueFullError

artifact = deploy.open_artifact(os.environ["MODEL"])


@asynccontextmanager
async def lifespan(app: FastAPI):
    with deploy.load(artifact) as session, Batcher(session, BatcherOptions(delay_ms=1)) as app.state.batcher:
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/classify")
async def classify(request: Request) -> dict[str, object]:
    try:
        image = artifact.preprocess.open(await request.body())
        outputs = await app.state.batcher.run_async({"input": image[None]}, timeout_s=1)
    except DataError as error:
        raise HTTPException(400, str(error)) from error
    except QueueFullError as error:
        raise HTTPException(503, str(error), {"Retry-After": "1"}) from error
    best = int(outputs["logits"][0].argmax())
    return {"class": artifact.manifest.classes[best] if artifact.manifest.classes else best}
