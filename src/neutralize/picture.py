"""A figure that a notebook shows. Imported when something is drawn: it needs matplotlib."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class Picture(Figure):
    """A matplotlib figure made without pyplot, which alone teaches notebooks to show figures: this one can itself."""

    def _repr_png_(self) -> bytes:
        """Return the picture for a notebook."""
        written = io.BytesIO()
        self.savefig(written, format="png")
        return written.getvalue()
