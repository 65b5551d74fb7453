"""What one would write without an engine: FastAPI, and one model behind a lock. ``python benchmarks/plain.py DIRECTORY
PORT`` serves an artifact, ``python benchmarks/plain.py eager PORT`` Hugging Face's own model."""

import base64
import io
import sys
import threading

import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel

from blip_helpers import NeuronBlipForQuestionAnswering, infer, load_blip

MODEL, PORT = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)  # as in the service
model, processor = load_blip()
if MODEL != "eager":
    model = NeuronBlipForQuestionAnswering.from_pretrained(MODEL)
lock = threading.Lock()
app = FastAPI()


class Body(BaseModel):
    inputs: str
    question: str


@app.post("/vqa")
def answer(body: Body):
    image = Image.open(io.BytesIO(base64.b64decode(body.inputs))).convert("RGB")
    with lock:
        text, score = infer(model, processor, body.question, image, return_scores=True, max_new_tokens=23)
    return [{"answer": text, "score": score}]


uvicorn.run(app, port=PORT, log_level="warning", access_log=False)
