FROM python:3.13-slim

WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir --only-binary=:all: -r requirements.txt
# Readable by the user below, whatever umask the files were checked out with.
COPY --chmod=644 usercount.py setup_db.py schema.sql gunicorn.conf.py ./

ENV APP_ENV=production PYTHONDONTWRITEBYTECODE=1
# Numeric, so that Kubernetes can verify runAsNonRoot.
USER 10001:10001
EXPOSE 6776
# Ignores any proxy in the environment: the request stays inside the container.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s CMD python -c "\
from urllib.request import ProxyHandler, build_opener; \
build_opener(ProxyHandler({})).open('http://127.0.0.1:${PORT:-6776}/health')"
# gunicorn's workers send heartbeats through a file, which a read-only file system allows only here.
CMD ["gunicorn", "--worker-tmp-dir=/dev/shm", "usercount:app"]
