"""The figure of notebook 08: what it draws is measured in the notebook, which asserts what it claims."""

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
