# One image; its command says which part runs: api, worker, migrate. Built from the hashed lock, nothing else is fetched.
FROM python:3.11.13-slim-bookworm AS build

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/primerisk
COPY requirements.lock ./
RUN /opt/primerisk/bin/pip install --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY app app
COPY migrations migrations
RUN /opt/primerisk/bin/pip install --no-deps --no-build-isolation .

FROM python:3.11.13-slim-bookworm

RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin primerisk
COPY --from=build /opt/primerisk /opt/primerisk
ENV PATH=/opt/primerisk/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    MPLCONFIGDIR=/tmp \
    PRIMERISK_HOST=0.0.0.0 \
    PRIMERISK_LOG_FORMAT=json
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000 9100
STOPSIGNAL SIGTERM
ENTRYPOINT ["primerisk"]
CMD ["api"]
