"""A FastStream application around a function.

`python -m tests.bench.faststream_app ADDRESS IN OUT MODEL article|fast`
"""

from __future__ import annotations

import asyncio
import sys

from faststream import FastStream
from faststream.confluent import KafkaBroker

from tests.bench.functions import function


def main() -> None:
    """Serve until terminated, at FastStream's own defaults."""
    address, source, target, model, which = sys.argv[1:]
    predict = function(which, model)
    broker = KafkaBroker(address, logger=None)

    async def serve(chunk: bytes) -> dict[str, float]:
        return predict(chunk)

    subscribed = broker.subscriber(source, group_id=f"faststream-{target}", auto_offset_reset="earliest")
    subscribed(broker.publisher(target)(serve))
    asyncio.run(FastStream(broker).run())


if __name__ == "__main__":
    main()
