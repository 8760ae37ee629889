# An image of this code for TPU hosts: see scripts/gke.sh.
FROM python:3.12-slim
WORKDIR /score_sde
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt gcsfs google-cloud-storage "jax[tpu]>=0.10.0,<0.13"
COPY . .
