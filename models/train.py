"""Train the two small models of the series from nothing: ``python models/train.py``.

Interrupt it with Ctrl-C whenever you like; the same command goes on where it stopped. Progress is kept in ``build/``,
the models go to ``models/tiny-resnet`` and ``models/tiny-blip-vqa``, and the accuracy on held-out pictures is printed.
What step n is trained on depends on nothing but n.
"""

import argparse
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts: spinning threads crawl on a busy machine

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessorPil,
    BlipProcessor,
    ConvNextImageProcessorPil,
    GenerationConfig,
    ResNetConfig,
    ResNetForImageClassification,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from blip_helpers import acting_question_mask  # noqa: E402
from models.scenes import KINDS, LABELS, PLACES, QUESTIONS, SIZE, examples, scene, shape_examples  # noqa: E402

SEED = 0
SCENES, QUESTIONS_A_SCENE, CHUNKS = 48, 4, 3  # a step of BLIP; its questions go through in chunks of like lengths
PICTURES = 64  # a step of the ResNet
ROUNDS = {"resnet": [(1500, 1e-3)], "blip": [(5000, 1e-3), (1200, 5e-4)]}  # steps, peak learning rate
WEAK = ("left or right", "describe")  # kinds that come three times as often in the second round
HELD_OUT = 2000
MAX_NEW_TOKENS = 23


def make_tokenizer():
    """A lower-case WordPiece tokenizer of the words of the scenes; letters and digits spell all other words."""
    texts = " ".join([*LABELS, *PLACES.values(), *sum(QUESTIONS.values(), ()), "yes no nothing and"])
    words = sorted(set("".join(c if c.isalpha() else " " for c in texts).split()))
    signs = "abcdefghijklmnopqrstuvwxyz0123456789"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *".,?!'-", *signs, *("##" + sign for sign in signs)]
    vocabulary += [word for word in words if word not in vocabulary] + ["[DEC]", "[ENC]"]
    return BertTokenizer(
        vocab={token: number for number, token in enumerate(vocabulary)},
        bos_token="[DEC]",
        extra_special_tokens=["[ENC]"],
        model_max_length=64,
    )


def make_blip():
    """An untrained BLIP of 2.3 M parameters and its processor."""
    tokenizer = make_tokenizer()
    size = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = BlipConfig(
        vision_config={**size, "image_size": SIZE, "patch_size": 16, "projection_dim": 128, "initializer_range": 0.02},
        text_config={
            **size,
            "encoder_hidden_size": 128,
            "projection_dim": 128,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 64,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.sep_token_id,
            "sep_token_id": tokenizer.sep_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        projection_dim=128,
        image_text_hidden_size=128,
    )
    model = BlipForQuestionAnswering(config)
    torch.nn.init.normal_(model.vision_model.embeddings.position_embedding, std=0.1)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        decoder_start_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    return model, BlipProcessor(BlipImageProcessorPil(size={"height": SIZE, "width": SIZE}), tokenizer)


def make_resnet():
    """An untrained ResNet of 0.4 M parameters and its image processor."""
    config = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 64, 128],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        id2label=dict(enumerate(LABELS)),
        label2id={label: number for number, label in enumerate(LABELS)},
    )
    return ResNetForImageClassification(config), ConvNextImageProcessorPil(size={"shortest_edge": SIZE}, crop_pct=1.0)


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal: https://kellerjordan.github.io/posts/muon. For the matrices inside a network.

    torch.optim.Muon computes in bfloat16, which takes a CPU without bfloat16 instructions twenty times as long.
    """

    def __init__(self, parameters, lr, momentum=0.95, weight_decay=0.05):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}
            for p in group["params"]:
                average = self.state[p].setdefault("momentum", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(average, group["momentum"])
                alike.setdefault(p.shape, []).append((p, update))
            for shape, pairs in alike.items():  # matrices of one shape go through together
                tall = shape[0] > shape[1]
                x = torch.stack([update.T if tall else update for _, update in pairs])
                x /= x.norm(dim=(1, 2), keepdim=True) + 1e-7
                for _ in range(5):
                    a = x @ x.mT
                    x = 3.4445 * x + (2.0315 * a @ a - 4.7750 * a) @ x
                for (p, _), update in zip(pairs, x * max(1, shape[0] / shape[1]) ** 0.5, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(update.T if tall else update, alpha=group["lr"])


def make_optimizers(model):
    """Muon for the matrices of the layers, AdamW for all else; `scale` times the learning rate is each group's own."""
    inner, rest = [], []
    for name, p in model.named_parameters():
        (inner if p.ndim == 2 and "embedding" not in name and "classifier" not in name else rest).append(p)
    adam = torch.optim.AdamW([{"params": rest, "scale": 1}], lr=0.0, weight_decay=0.0, fused=True)
    return [adam, Muon([{"params": inner, "scale": 10}], lr=0.0)] if inner else [adam]


class BlipData:
    """The batches of BLIP by number: pictures, and chunks of questions and answers padded to their longest."""

    def __init__(self, processor, steps):
        self.processor, self.steps = processor, steps

    def __len__(self):
        return self.steps

    def __getitem__(self, step):
        random = Random(f"blip {SEED} {step}")
        scenes = [scene(2 * number) for number in range(step * SCENES, (step + 1) * SCENES)]
        second_round, asked = step >= ROUNDS["blip"][0][0], []
        for at, seen in enumerate(scenes):
            kinds = seen.kinds()
            counts = [3 if second_round and kind in WEAK else 1 for kind in kinds]
            asked += [(at, seen.ask(kind, random)) for kind in random.sample(kinds, QUESTIONS_A_SCENE, counts=counts)]
        tokenizer = self.processor.tokenizer
        questions = tokenizer([example.question for _, example in asked]).input_ids
        answers = tokenizer([example.answer for _, example in asked]).input_ids
        answers = [[tokenizer.bos_token_id, *answer[1:]] for answer in answers]
        order = sorted(range(len(asked)), key=lambda row: (len(answers[row]), len(questions[row])))
        chunks = []
        for rows in torch.tensor(order).chunk(CHUNKS):
            question, answer = (
                torch.nn.utils.rnn.pad_sequence([torch.tensor(ids[row]) for row in rows], batch_first=True)
                for ids in (questions, answers)
            )
            chunks.append((torch.tensor([asked[row][0] for row in rows]), question, answer))
        pixels = self.processor.image_processor([seen.image for seen in scenes], return_tensors="pt").pixel_values
        return pixels, chunks


def blip_loss(model, batch):
    """The mean loss of an answer's token. Each picture is encoded once, for all its questions."""
    pixels, chunks = batch
    images = model.vision_model(pixels).last_hidden_state
    loss, tokens = 0, 0
    with acting_question_mask(model):
        for picture, question, answer in chunks:
            mask = (question != 0).long()
            features = model.text_encoder(question, attention_mask=mask, encoder_hidden_states=images[picture])
            output = model.text_decoder(
                answer,
                encoder_hidden_states=features.last_hidden_state,
                encoder_attention_mask=mask,
                labels=answer.masked_fill(answer == 0, -100),
                reduction="sum",
            )
            loss = loss + output.loss
            tokens += int((answer[:, 1:] != 0).sum())
    return loss / tokens


class ResnetData:
    """The batches of the ResNet by number."""

    def __init__(self, processor, steps):
        self.processor, self.steps = processor, steps

    def __len__(self):
        return self.steps

    def __getitem__(self, step):
        images, labels = zip(*shape_examples("train", PICTURES, start=step * PICTURES), strict=True)
        return self.processor(list(images), return_tensors="pt").pixel_values, torch.tensor(labels)


def resnet_loss(model, batch):
    pixels, labels = batch
    return model(pixels, labels=labels).loss


def evaluate_blip(model, processor, questions):
    """Exact matches and questions by kind: the stock model, one unpadded question at a time."""
    model.eval()
    right, asked = Counter(), Counter()
    for example in questions:
        inputs = processor(images=example.image, text=example.question, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)
        asked[example.kind] += 1
        right[example.kind] += processor.decode(output[0], skip_special_tokens=True) == example.answer
    return right, asked


@torch.no_grad()
def evaluate_resnet(model, processor, pictures):
    """Pictures named right, and pictures."""
    model.eval()
    right = total = 0
    for image, label in pictures:
        logits = model(**processor(image, return_tensors="pt")).logits
        right, total = right + int(logits.argmax() == label), total + 1
    return right, total


def learning_rate(step, rounds, warmup=200, decay=0.35):
    """In each round: up in a line, level, and in the last part down to nothing in a line."""
    for steps, peak in rounds:
        if step < steps:
            return peak * min((step + 1) / warmup, 1, (steps - step) / (decay * steps))
        step -= steps
    raise ValueError(f"the last round ended {step} steps before")


def save_atomically(state, path):
    path.parent.mkdir(exist_ok=True)
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def train(name, make, data_class, loss_of, check, steps):
    """Train a model, from its checkpoint where there is one; None where Ctrl-C ended it before the last step."""
    torch.manual_seed(SEED)
    model, processor = make()
    optimizers = make_optimizers(model)
    checkpoint, first, seconds = ROOT / "build" / f"{name}.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, seconds = state["step"], state["seconds"]

    stopped = False

    def stop(number, frame):
        nonlocal stopped
        stopped = True

    before = signal.signal(signal.SIGINT, stop)
    began, smooth = time.perf_counter() - seconds, None
    data = data_class(processor, steps)
    loader = DataLoader(data, batch_size=None, sampler=range(first, steps), num_workers=1, prefetch_factor=4)
    bar = tqdm(loader, desc=name, initial=first, total=steps, mininterval=2)
    for step, batch in enumerate(bar, first):
        model.train()
        loss = loss_of(model, batch)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * learning_rate(step, ROUNDS[name])
            optimizer.step()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
        done = step + 1
        if done % 250 == 0 or done == steps or stopped:
            seconds = time.perf_counter() - began
            saved = [optimizer.state_dict() for optimizer in optimizers]
            state = {"model": model.state_dict(), "optimizers": saved, "step": done, "seconds": seconds}
            save_atomically(state, checkpoint)
        if stopped:
            break
        if done % 500 == 0 and done < steps:
            bar.write(f"{name} after {done} steps: loss {smooth:.3f}, {check(model, processor)}")
    bar.close()
    signal.signal(signal.SIGINT, before)
    if stopped:
        print(f"{name}: stopped after {done} of {steps} steps; the same command goes on from there")
        return None
    print(f"{name}: trained {steps} steps in {seconds / 60:.1f} minutes")
    return model.eval(), processor


def check_blip(model, processor):
    """Exact match on a few training-split pictures that training never reaches, for the eye."""
    right, asked = evaluate_blip(model, processor, examples("train", 20 * len(KINDS), start=10**8))
    rates = ", ".join(f"{kind} {right[kind] / asked[kind]:.0%}" for kind in KINDS)
    return f"exact match {right.total() / asked.total():.1%} ({rates})"


def check_resnet(model, processor):
    right, total = evaluate_resnet(model, processor, shape_examples("train", 200, start=10**8))
    return f"accuracy {right / total:.1%}"


def publish(model, processor, folder):
    """Save a model beside its folder, then move the files in, each at once."""
    fresh = ROOT / "build" / folder.name
    model.save_pretrained(fresh)
    processor.save_pretrained(fresh)
    folder.mkdir(exist_ok=True)
    for file in fresh.iterdir():
        file.chmod(0o644)
        os.replace(file, folder / file.name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=ROUNDS, help="train this one only")
    parser.add_argument("--steps", type=int, help="end after this step, for a trial")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    parts = {
        "resnet": (make_resnet, ResnetData, resnet_loss, check_resnet),
        "blip": (make_blip, BlipData, blip_loss, check_blip),
    }
    for name in [arguments.model] if arguments.model else ROUNDS:
        trained = train(name, *parts[name], arguments.steps or sum(steps for steps, _ in ROUNDS[name]))
        if trained is None:
            return
        if name == "resnet":
            publish(*trained, ROOT / "models" / "tiny-resnet")
            right, total = evaluate_resnet(*trained, shape_examples("held-out", HELD_OUT))
            print(f"accuracy on held-out pictures: {right} of {total}, {right / total:.1%}")
        else:
            publish(*trained, ROOT / "models" / "tiny-blip-vqa")
            questions = tqdm(examples("held-out", HELD_OUT), total=HELD_OUT, desc="evaluate")
            right, asked = evaluate_blip(*trained, questions)
            print(f"{'kind':15}{'questions':>10}{'exact match':>13}")
            for kind in KINDS:
                print(f"{kind:15}{asked[kind]:10}{right[kind] / asked[kind]:13.1%}")
            print(f"{'all':15}{asked.total():10}{right.total() / asked.total():13.1%}")


if __name__ == "__main__":
    main()
