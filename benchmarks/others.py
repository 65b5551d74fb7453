"""What else a user would pick, used plainly: ``torch.compile``, ONNX Runtime, OpenVINO. For `benchmarks/compare.py`.

The parts are exported as they are, with free lengths and without a cache, which three tokens do not need: a step takes
as long as reading its weights. As in OpenVINO's own BLIP notebook the image is encoded again for each question.
"""

import copy
import importlib.util
import warnings

import torch
from torch import nn


class Vision(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.vision_model = model.vision_model

    def forward(self, pixel_values):
        return self.vision_model(pixel_values)[0]


class Question(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.text_encoder = model.text_encoder

    def forward(self, input_ids, image_embeds):
        return self.text_encoder(input_ids, torch.ones_like(input_ids), encoder_hidden_states=image_embeds)[0]


class Decoder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.text_decoder = model.text_decoder

    def forward(self, input_ids, features):
        return self.text_decoder(input_ids, encoder_hidden_states=features, use_cache=False).logits[:, -1]


def parts_of(model, question_tokens):
    """Each part with an example call, and the names of its inputs; "L" is a free length."""
    config = model.config
    size, width = config.vision_config.image_size, config.text_config.hidden_size
    tokens = (size // config.vision_config.patch_size) ** 2 + 1
    pixels = torch.zeros(1, 3, size, size)
    image, features = torch.zeros(1, tokens, config.vision_config.hidden_size), torch.zeros(1, question_tokens, width)
    ids = torch.full((1, question_tokens), 5)
    return {
        "vision": (Vision(model), {"pixel_values": pixels}),
        "question": (Question(model), {"input_ids": ids, "image_embeds": image}),
        "decoder": (Decoder(model), {"input_ids": ids[:, :2], "features": features}),
    }


def by_torch(model):
    """The model with each part's forward compiled by ``torch.compile``."""
    compiled = copy.deepcopy(model)
    for part in (compiled.vision_model, compiled.text_encoder, compiled.text_decoder):
        part.forward = torch.compile(part.forward)
    return compiled


def by_onnx_runtime(model, question_tokens, directory, threads):
    """``{part: call}``, by ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    calls = {}
    for name, (module, inputs) in parts_of(model, question_tokens).items():
        path = directory / f"plain-{name}.onnx"
        free = {"input_ids": {1: "L"}} if name == "decoder" else {}
        with warnings.catch_warnings(action="ignore"):
            torch.onnx.export(
                module.eval(), tuple(inputs.values()), path, input_names=list(inputs), dynamic_axes=free, dynamo=False
            )
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        def call(*given, session=session, names=tuple(inputs)):
            (output,) = session.run(None, {name: one.numpy() for name, one in zip(names, given, strict=True)})
            return torch.from_numpy(output)

        calls[name] = call
    return calls


def by_openvino(model, question_tokens, precision, threads):
    """``{part: call}``, by OpenVINO; `precision` is f32 or bf16."""
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    calls = {}
    for name, (module, inputs) in parts_of(model, question_tokens).items():
        with warnings.catch_warnings(action="ignore"):
            converted = openvino.convert_model(module.eval(), example_input=tuple(inputs.values()))
        shapes = {port: list(one.shape) for port, one in zip(converted.inputs, inputs.values(), strict=True)}
        if name == "decoder":
            shapes[converted.inputs[0]] = [1, -1]
        converted.reshape(shapes)
        request = core.compile_model(converted, "CPU", settings).create_infer_request()

        def call(*given, request=request):
            return torch.from_numpy(request.infer([one.numpy() for one in given])[0].copy())

        calls[name] = call
    return calls


def installed(package):
    return importlib.util.find_spec(package) is not None


def answer(calls, model, questions, pixels, new_tokens):
    """Token ids of the answers, one question at a time: int64 [questions, 1 + new_tokens]."""
    answers = []
    for question in questions:
        features = calls["question"](question[None], calls["vision"](pixels))
        ids = torch.tensor([[model.decoder_start_token_id]])
        for _ in range(new_tokens):
            ids = torch.cat((ids, calls["decoder"](ids, features).argmax(-1, keepdim=True)), dim=1)
        answers.append(ids)
    return torch.cat(answers)
