# A Debian with what the README asks for and nothing else, an ordinary user, and a clone of this repository to clone.
ARG DEBIAN_IMAGE=debian:trixie-slim
FROM ${DEBIAN_IMAGE}
# Whatever version there is: that is what a newcomer has.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates git make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home newcomer
COPY --chown=newcomer newcomer /home/newcomer/
COPY --chown=newcomer stalk.git /home/newcomer/stalk.git
# hadolint ignore=DL3066
USER newcomer
WORKDIR /home/newcomer
