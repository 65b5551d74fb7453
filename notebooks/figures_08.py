"""The figures of notebook 08: what they draw was measured in it, or by benchmarks/serve.py."""

import matplotlib.pyplot as plt
from figures_05_07 import BLACK, BLUE, _axes


def batches(asked_at, batches):
    """When questions came, and which of them went together: ticks below, a bar for each batch above."""
    start = min(asked_at)
    _, axes = _axes(2.4, title="Batches form while the core is busy", xlabel="milliseconds")
    axes.vlines([1e3 * (at - start) for at in asked_at], 0.0, 0.3, color=BLACK, lw=1.2)
    for number, (begin, end, size) in enumerate(batches):
        begin, end = 1e3 * (begin - start), 1e3 * (end - start)
        axes.barh(
            0.75, end - begin, 0.5, begin, color="white", edgecolor=BLUE, hatch="//" if number % 2 else "", lw=1.5
        )
        axes.text((begin + end) / 2, 0.75, size, ha="center", va="center", bbox={"fc": "white", "ec": "none", "pad": 1})
    axes.set(ylim=(0, 1.1), yticks=[0.15, 0.75], yticklabels=["questions", "the core"])
    plt.show()


def sweep(said):
    """What came back at each rate of questions, up to twice the knee, and how long it took."""
    rates = [*said["rates"], said["twice"]]
    offered = [row["rate"] for row in rates]
    _, (above, below) = plt.subplots(2, 1, figsize=(6.4, 5.2), sharex=True, layout="constrained")
    for axes, label in ((above, "answered\na second"), (below, "milliseconds")):
        axes.axvline(said["knee"]["rate"], color="0.6", ls="--")
        axes.set(ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
    above.plot(offered, offered, color="0.6", lw=1)
    above.plot(offered, [row["a second"] for row in rates], "o-", color=BLUE, mfc="white", lw=1.5)
    for name, style in (("p50", "o-"), ("p99", "s:")):
        below.plot(offered, [row[name] for row in rates], style, color=BLACK, mfc="white", label=name)
    below.legend(frameon=False)
    below.set(xlabel="questions a second that were asked", ylim=(0, None))
    above.set(ylim=(0, None), title="Up to the knee everything is answered")
    plt.show()
