"""An image pipeline: decode a photograph, shrink it, find its edges, describe both."""

from typing import Any

import tierwise

app = tierwise.App("photos")


@app.function(memory="128MiB", deadline="200ms", priority="high", keep_alive="3s")
def describe_photo(jpeg: bytes) -> dict[str, Any]:
    """Return size, histogram and edge density, at three scales, of a JPEG."""
    import io

    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(jpeg)) as image:
        size = image.size
        picture = image.convert("L")
        scales = [picture, *(picture.resize((size[0] // n, size[1] // n)) for n in (2, 4))]
    density = []
    for scale in scales:
        grey = np.asarray(scale, dtype=np.float32)
        down = grey[2:, 1:-1] - grey[:-2, 1:-1]
        right = grey[1:-1, 2:] - grey[1:-1, :-2]
        density.append(float((np.hypot(down, right) > 40.0).mean()))
    histogram, _ = np.histogram(np.asarray(picture), bins=16, range=(0, 255))
    return {"size": list(size), "histogram": histogram.tolist(), "edge_density": density}
