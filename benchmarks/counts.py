"""Keeps tables of counts for the report, and prints them."""

from typing import Any

# What is counted of a multiprocessor, as `triton_offline.pipe_cycles` names it.
PIPES = ("issue", "tensor", "special", "float", "integer", "memory")


def keep(benchmark: Any, title: str, head: list[str], rows: list[list], *notes: str) -> None:
    """Puts a table into the JSON of pytest-benchmark.

    Args:
        benchmark: pytest-benchmark's fixture.
        title: Of the table.
        head: Names of the columns.
        rows: What stands in them.
        notes: Sentences below it.
    """
    rows = [[str(part) for part in row] for row in rows]
    benchmark.extra_info.update(level="counts", title=title, head=head, rows=rows, notes=notes)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    print(f"\n{title}")
    for row in (head, *rows):
        print("  ".join(part.ljust(width) for part, width in zip(row, widths, strict=True)))
    print(*notes, sep="\n")
