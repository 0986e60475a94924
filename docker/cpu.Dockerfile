# A machine without a GPU: docker build -f docker/cpu.Dockerfile -t aem-lightning:cpu .
# mkdir -p runs && docker run --rm --user "$(id -u):$(id -g)" -e HOME=/tmp -e USER=aem \
#     -v "$PWD/runs:/runs" aem-lightning:cpu experiment=quickstart
FROM python:3.12-slim-bookworm AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git make \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/aem
ENV PATH=/opt/aem/bin:$PATH PIP_NO_CACHE_DIR=1
WORKDIR /build
COPY constraints.txt ./
RUN pip install -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu torch
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY docs/names.md docs/
COPY src src
RUN pip install -c constraints.txt ".[alfworld,api,gymnasium,swe,webshop]"

FROM python:3.12-slim-bookworm
# Episodes of swe run in bubblewrap, which asks for a container of its own: docs/swe.md.
RUN apt-get update \
    && apt-get install -y --no-install-recommends bubblewrap git libseccomp2 libstdc++6 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home aem && install -d -o aem /runs
COPY --from=build /opt/aem /opt/aem
ENV PATH=/opt/aem/bin:$PATH
USER aem
WORKDIR /runs
VOLUME /runs
ENTRYPOINT ["aem-train"]
CMD ["--help"]
