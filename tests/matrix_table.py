"""python -m tests.matrix_table: the cells that test_matrix.py checks, as a table in Markdown."""

from tests.helpers import measured
from tests.workers.matrix import DTYPES


def main() -> None:
    print("| precision | ZeRO | passes | ranks | loss, first and last step | skipped | largest error of the gradient norm |")
    print("|---|---:|---:|---:|---|---:|---:|")
    cells = {ranks: measured("matrix.py", ranks)[0]["cells"] for ranks in (1, 2)}
    for precision in DTYPES:
        for stage in (0, 1, 2, 3):
            for accumulation in (1, 2):
                for ranks in (1, 2):
                    cell = cells[ranks][precision, stage, accumulation]
                    errors = [abs(ours - true) / true for ours, true in zip(cell["norms"], cell["true norms"], strict=True)]
                    losses = f"{cell['losses'][0]:.4f} to {cell['losses'][-1]:.4f}"
                    place = f"| {precision} | {stage} | {accumulation} | {ranks} "
                    print(f"{place}| {losses} | {cell['skipped']:g} | {max(errors):.1e} |")


if __name__ == "__main__":
    main()
