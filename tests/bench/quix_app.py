"""A Quix Streams application around a function: `python -m tests.bench.quix_app ADDRESS IN OUT MODEL article|fast`."""

from __future__ import annotations

import sys

from quixstreams import Application

from tests.bench.functions import function


def main() -> None:
    """Serve until terminated, at Quix's own defaults (at least once)."""
    address, source, target, model, which = sys.argv[1:]
    app = Application(
        broker_address=address, consumer_group=f"quix-{target}", auto_offset_reset="earliest", auto_create_topics=False
    )
    chunks = app.topic(source, value_deserializer="bytes")
    predictions = app.topic(target, value_serializer="json")
    app.dataframe(chunks).apply(function(which, model)).to_topic(predictions)
    app.run()


if __name__ == "__main__":
    main()
