"""Before and on Inf2: ``python blip.py check | compile | report | serve | reload``.

``check`` needs no package of AWS: it lowers every graph of a model as Neuron does and looks for what fails there.
``compile`` needs AWS's packages and no Neuron device: it makes an artifact to be copied to an Inf2 instance. ``report``
runs such an artifact, on Inf2 or anywhere else, and prints what came out as a table to paste. ``serve`` makes it a
service on this machine, ``reload`` gives the service another artifact. Exit status: 0, 1 on a finding or an answer that
differs, 2 if it could not be done, 130 if it was interrupted.
"""

import argparse
import platform
import signal
import statistics
import sys
import time


def interrupted(*_):
    print("\ninterrupted", file=sys.stderr)
    sys.exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupted)  # before the imports, which take seconds

import torch

import blip_helpers as bh
from blip_checkpoints import check_traced_from
from blip_helpers import BlipShapes
from models.scenes import examples

CALLS = 50


def resnet_parts(source):
    """The one graph of a ResNet, as `parts_to_trace` gives those of a BLIP."""
    model, image_processor = bh.load_resnet(source)
    size = image_processor.size.get("shortest_edge") or image_processor.size["height"]
    return {"resnet": (bh.Logits(model), (torch.zeros(1, 3, size, size),))}


def parts_of(arguments, shapes, decoders):
    """Every graph of a checkpoint, and the size of its vocabulary."""
    source = arguments.model
    kind = bh.load_config(source).model_type if source else "blip"
    if kind == "resnet":
        return resnet_parts(source), 0
    if kind != "blip":
        raise ValueError(f"{source} is a {kind}; this series compiles blip and resnet")
    model, _ = load_blip(arguments)
    parts = bh.each_graph_once({decoder: bh.parts_to_trace(model, shapes, decoder) for decoder in decoders})
    return parts, model.config.text_config.vocab_size


def load_blip(arguments):
    """The model and the processor that the arguments name."""
    size = getattr(arguments, "image_size", None)
    return bh.load_blip(arguments.model, processor=arguments.processor, image_size=size)


def check(arguments):
    """Lower and check every graph; a table, then what was found."""
    parts, vocab_size = parts_of(arguments, shapes_of(arguments), arguments.decoders)
    return bh.print_checks(bh.check_parts(parts, vocab_size), parts)


def compile_(arguments):
    """Compile a whole artifact for Inf2 on a machine without a Neuron device."""
    model, processor = load_blip(arguments)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    bh.compile_for_inf2(
        model,
        arguments.directory,
        shapes_of(arguments),
        decoder=arguments.decoder,
        processor=processor,
        dtype=dtype,
    )
    model = f" --model {arguments.model}" if arguments.model else ""
    model += f" --processor {arguments.processor}" if arguments.processor else ""
    print(
        f"compiled for Inf2, not run. Copy {arguments.directory} to the instance, then run there: "
        f"python blip.py report {arguments.directory}{model}"
    )


def report(arguments):
    """Verify an artifact against its checkpoint and time its graphs; prints Markdown."""
    model, processor = load_blip(arguments)
    start = time.perf_counter()
    compiled = bh.NeuronBlipForQuestionAnswering.from_pretrained(arguments.directory)
    loaded = time.perf_counter() - start
    manifest = bh.read_manifest(arguments.directory)
    size = compiled.config.vision_config.image_size
    if size != model.config.vision_config.image_size:
        model, processor = bh.resize_image(model, processor, size)
    pixels = compiled.one_call and compiled.one_call.pixels
    parts = bh.parts_to_trace(model, compiled.shapes, manifest["decoder"], pixels)
    check_traced_from(arguments.directory, manifest, parts, model.name_or_path)
    asked = bh.question_count(arguments.questions)
    verified = list(bh.progress(bh.verify(compiled, model, processor, examples("held-out", asked)), asked))
    equal = sum(row.actual == row.expected for row in verified)
    part = manifest["parts"]["vision_model"]
    rows = [
        ("ran on", bh.what_runs_here(manifest["backend"])),
        ("host", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in part["versions"].items())),
        ("shapes", ", ".join(f"{name} {value}" for name, value in manifest["shapes"].items())),
        ("decoder, products", f"{manifest['decoder']}, {part['dtype']}"),
        ("compiler arguments", " ".join(part["compiler_args"]) or "none"),
        ("answers equal to eager", f"{equal} of {asked}"),
        ("largest logit difference", f"{max(row.difference for row in verified):.1e}"),
        ("loading", f"{loaded:.1f} s"),
    ]
    questions = compiled.text_encoder.graph  # where there are several lengths, a module of several graphs
    graphs = [compiled.vision_model.graph, *getattr(questions, "graphs", [questions])]
    graphs.append(compiled.text_decoder.decoder.decoder)
    graphs += [] if compiled.one_call is None else [compiled.one_call.of_features, compiled.one_call.of_picture]
    for graph, (name, (_, inputs)) in zip(graphs, parts.items(), strict=True):
        rows.append((f"{name}, a call", milliseconds(graph, inputs)))
    question = next(examples("held-out", 1))
    answer = lambda: bh.infer(compiled, processor, question.question, question.image)  # noqa: E731
    rows.append(("one question, end to end", milliseconds(answer, ())))
    print("\n| | |\n|---|---|")
    for row in rows:
        print("| {} | {} |".format(*row))
    return int(equal != asked)


def serve(arguments):
    """Serve an artifact until Ctrl-C; Ray is imported here, since the other commands do without it."""
    from service.running import serve_until_interrupted

    return serve_until_interrupted(arguments)


def reload(arguments):
    """Give the running service another artifact."""
    from service.reloading import reload_artifact

    return reload_artifact(arguments)


def milliseconds(call, inputs):
    """Median, and the 99th percentile, of calls after ten that are thrown away."""
    times = []
    with torch.no_grad():
        for turn in range(CALLS + 10):
            start = time.perf_counter()
            call(*inputs)
            if turn >= 10:
                times.append(1e3 * (time.perf_counter() - start))
    return f"p50 {statistics.median(times):.2f} ms, p99 {statistics.quantiles(times, n=100)[98]:.2f} ms"


def shapes_of(arguments):
    lengths = tuple(arguments.question_length)
    return BlipShapes(
        batch_size=arguments.batch_size,
        num_beams=arguments.num_beams,
        question_length=lengths if len(lengths) > 1 else lengths[0],
        answer_length=arguments.answer_length,
        unrolled_steps=arguments.unrolled_steps,
    )


def positive(text):
    """A whole number of at least 1, for an argument of a command."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of at least 1")
    return int(text)


def read_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    help_model = "a directory or a hub name; by default BLIP_MODEL or the bundled model"
    one = commands.add_parser(
        "check", help="lower every graph and look for what fails on Inf2; exit status 1 on a finding"
    )
    one.add_argument("model", nargs="?", help=help_model + "; a ResNet is checked as well")
    one.add_argument("--decoders", nargs="+", default=[*bh.DECODERS], choices=[*bh.DECODERS])
    two = commands.add_parser("compile", help="with AWS's packages, without a device: make an artifact for Inf2")
    two.add_argument("directory", help="where to, such as build/blip-inf2")
    two.add_argument("--model", help=help_model)
    two.add_argument("--decoder", default="cached", choices=[*bh.DECODERS])
    two.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="what matrices are multiplied in")
    for command in (one, two):
        command.add_argument("--image-size", type=int, help="pixels, such as 480; by default those of the checkpoint")
        command.add_argument("--batch-size", type=int, default=1)
        command.add_argument("--num-beams", type=int, default=1)
        command.add_argument("--question-length", type=int, nargs="+", default=[16], help="several make a graph each")
        command.add_argument("--answer-length", type=int, default=24)
        command.add_argument(
            "--unrolled-steps", type=int, default=4, help="with --decoder unrolled: tokens in one call"
        )
    three = commands.add_parser("report", help="run an artifact; print what came out, to paste into an issue")
    three.add_argument("directory", help="what trace or compile left")
    three.add_argument("--model", help=help_model)
    three.add_argument("--questions", type=int, default=200, help="how many to ask at most (200)")
    four = commands.add_parser("serve", help="answer over HTTP, with a page to try it on, until Ctrl-C")
    four.add_argument("directory", help="what trace or compile left; a model is traced into it if nothing is there")
    four.add_argument("--model", help=help_model)
    four.add_argument("--replicas", type=positive, default=1, help="each has a NeuronCore of its own (1)")
    four.add_argument("--ingresses", type=positive, help="processes that decode pictures; by default the CPUs to spare")
    four.add_argument(
        "--seen-bytes", type=positive, default=2**28, help="what a process keeps of seen pictures (2**28)"
    )
    four.add_argument("--host", default="127.0.0.1", help="0.0.0.0 answers other machines too; 127.0.0.1 by default")
    four.add_argument("--port", type=positive, default=8000)
    four.add_argument(
        "--metrics-port", type=positive, help="where Prometheus reads; by default a free one, which is said"
    )
    five = commands.add_parser("reload", help="give the service of this machine another artifact, without a gap")
    five.add_argument("directory", help="what trace or compile left")
    five.add_argument("--model", help=help_model)
    for command in (one, two, three, four, five):
        command.add_argument("--processor", help="a directory or a hub name; by default it is beside the model")
    given = parser.parse_args(arguments)
    if given.command == "report" and given.questions < 1:
        parser.error(f"--questions is {given.questions}: ask one or more")
    return given


def main():
    arguments = read_arguments()
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    try:
        commands = {"check": check, "compile": compile_, "report": report, "serve": serve, "reload": reload}
        return commands[arguments.command](arguments)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"blip.py {arguments.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
