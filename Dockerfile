FROM python:3.13-slim

WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir --only-binary=:all: -r requirements.txt
# Readable for the user below, whatever the umask of the checkout was.
COPY --chmod=644 usercount.py setup_db.py schema.sql gunicorn.conf.py ./

ENV APP_ENV=production PYTHONDONTWRITEBYTECODE=1
# A number: of a name, Kubernetes' runAsNonRoot could not tell that it is not root.
USER 10001:10001
EXPOSE 6776
# A proxy that the environment names is not for a request to oneself.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s CMD python -c "\
from urllib.request import ProxyHandler, build_opener; \
build_opener(ProxyHandler({})).open('http://127.0.0.1:${PORT:-6776}/health')"
# gunicorn's workers need a file to show that they are alive, and where the file system is
# read-only, this is the place left for it.
CMD ["gunicorn", "--worker-tmp-dir=/dev/shm", "usercount:app"]
