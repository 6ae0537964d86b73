# Stands in for redis:8.0 on a host that reaches no registry; built by docker/base/build.
FROM stalk-base/debian:trixie

# The official image's ids, so that a data volume serves under either image.
RUN groupadd --system --gid 999 redis \
    && useradd --system --gid redis --uid 999 --home-dir /data --no-create-home redis \
    && install --directory --owner=redis --group=redis /data

RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        redis-sentinel=5:8.0.* \
        redis-server=5:8.0.* \
    && rm -rf /var/lib/apt/lists/*

# By number: Kubernetes' runAsNonRoot cannot judge a name.
USER 999
WORKDIR /data
VOLUME /data
EXPOSE 6379
CMD ["redis-server"]
