# One image for the trainer, the worker and the player. BASE is any Debian with Python 3.11 to 3.13.
ARG BASE=python:3.13-slim

FROM ${BASE} AS dependencies
COPY requirements.lock pyproject.toml /src/
WORKDIR /src
# Every download is checked against the hashes of the lock; what only developers need stays behind in /wheels.
RUN python3 -m venv /opt/earshot \
 && PATH=/opt/earshot/bin:$PATH \
 && pip download --quiet --require-hashes --dest /wheels --requirement requirements.lock \
 && python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
    | pip install --quiet --no-index --find-links /wheels --requirement /dev/stdin

FROM dependencies AS wheel
RUN python3 -m venv /opt/build && /opt/build/bin/pip install --quiet --no-index --find-links /wheels hatchling
COPY README.md LICENSE ./
COPY worker worker
COPY trainer trainer
RUN /opt/build/bin/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /dist .

FROM ${BASE}
# Numba compiles for no processor in particular, so that what is compiled below fits wherever this image runs.
ENV PATH=/opt/earshot/bin:$PATH PYTHONUNBUFFERED=1 NUMBA_CPU_NAME=generic NUMBA_CACHE_DIR=/opt/compiled
RUN useradd --create-home --uid 10001 earshot && install -d -o earshot -g earshot /data /opt/compiled
COPY --from=dependencies /opt/earshot /opt/earshot
COPY --from=wheel /dist /tmp/dist
RUN pip install --quiet --no-index --no-deps /tmp/dist/*.whl
USER earshot
WORKDIR /data
# Train and load small models, one of each kind and with every feature: shows that the image works, and leaves
# everything compiled, so that a worker starts with machine code instead of ten seconds of compiling. Once more for
# processors with AVX2, which nearly all have that are called x86-64: it takes a third off the time of a chunk.
RUN earshot-trainer simulate /tmp/clips --clips 36 --seconds 1 \
 && printf '[[sets]]\nkind = "frames"\nname = "%s"\nn_fft = %s\nwin_length = %s\nfamilies = ["mel", "mfcc", "delta"]\n' \
      1024 1024 1024 2048 2048 2048 > /tmp/sets.toml \
 && for cpu in $NUMBA_CPU_NAME $(grep -qs avx2 /proc/cpuinfo && echo x86-64-v3); do \
      for label in label rpm; do \
        NUMBA_CPU_NAME=$cpu earshot-trainer fit /tmp/clips --label $label --out /tmp/bundle --trees 8 \
          --features article+compact+rich+pitch --no-cache --no-report || exit 1; \
      done; \
      NUMBA_CPU_NAME=$cpu earshot-trainer fit /tmp/clips --out /tmp/bundle --trees 8 \
        --features /tmp/sets.toml --precision float32 --no-cache --no-report || exit 1; \
    done \
 && rm -r /tmp/clips /tmp/bundle /tmp/sets.toml
# Numba takes kept machine code only from a folder that can be written to, and without any such folder librosa cannot be
# imported. Shared memory is one in every container: also if the root file system is read-only, and for any user.
ENV NUMBA_CACHE_DIR=/dev/shm/numba
ENTRYPOINT ["sh", "-c", "cp -r /opt/compiled/. $NUMBA_CACHE_DIR; grep -qs avx2 /proc/cpuinfo && export NUMBA_CPU_NAME=x86-64-v3; exec \"$@\"", "sh"]
CMD ["earshot-worker", "run"]
