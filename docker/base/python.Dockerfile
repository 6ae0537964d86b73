# Stands in for python:3.13-slim on a host that reaches no registry; built by docker/base/build.
FROM stalk-base/debian:trixie

# uv brings certificates of its own and takes the image's only when this names them; pip finds them anyway.
ENV LANG=C.UTF-8 \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt

# EXTERNALLY-MANAGED keeps pip away from a system that needs its Python; nothing here does.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        netbase=6.* \
        python3-pip=25.* \
        python3.13=3.13.* \
        python3.13-venv=3.13.* \
    && rm -rf /var/lib/apt/lists/* /usr/lib/python3*/EXTERNALLY-MANAGED \
    && ln -s /usr/bin/python3.13 /usr/local/bin/python3.13 \
    && ln -s python3.13 /usr/local/bin/python3 \
    && ln -s python3.13 /usr/local/bin/python

CMD ["python"]
