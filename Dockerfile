# One node of Stagecast. Its log and its images are on the volume /data; nothing else is written but /tmp.
# It listens beyond the container, so it needs a key: STAGECAST_JWT_SECRET or STAGECAST_JWKS_URL (docs/settings.md).

# The official Socket.IO client, for the page, and the viewer of /docs.
FROM node:22-slim AS client
WORKDIR /build
COPY package.json ./
RUN npm install --omit=dev --no-audit --no-fund --no-package-lock --ignore-scripts
RUN mkdir vendor && cd node_modules && cp socket.io-client/dist/socket.io.min.js swagger-ui-dist/swagger-ui-bundle.js \
    swagger-ui-dist/swagger-ui.css ../vendor

FROM python:3.13-slim AS build
WORKDIR /build
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
COPY --from=client /build/vendor src/api/web/static/vendor
RUN python -m venv --without-pip /opt/stagecast
RUN pip --python /opt/stagecast/bin/python install --constraint constraints.txt '.[all]'

FROM python:3.13-slim
RUN useradd --system --uid 10001 --no-create-home stagecast && install -d -o stagecast -g stagecast /data
COPY --from=build /opt/stagecast /opt/stagecast
ENV PATH=/opt/stagecast/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    STAGECAST_HOST=0.0.0.0 \
    STAGECAST_LOG=sqlite:////data/log.db \
    STAGECAST_IMAGES=/data/images
USER 10001
WORKDIR /data
VOLUME /data
EXPOSE 3000
HEALTHCHECK --start-period=10s --start-interval=1s --interval=10s --timeout=5s \
    CMD ["python", "-c", "import os, urllib.request as http; http.urlopen(f'http://127.0.0.1:{os.getenv(\"STAGECAST_PORT\", 3000)}/health/ready')"]
ENTRYPOINT ["stagecast"]
CMD ["serve"]
