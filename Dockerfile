# bbb with CUDA 13 on Debian 12, the system that its scripts are written for. The toolkit comes from
# NVIDIA's image: it is self-contained below /usr/local/cuda-13.0.
#
#   docker build -t bbb .                        with --build-arg ARCHITECTURES=80, 120, ..
#   docker run --rm --gpus all bbb scripts/quickstart.sh
#   docker run --rm --gpus all bbb scripts/test.sh
#   docker run --rm --gpus all -v "$PWD:/data" bbb bbb ppl --model /data/MODEL --text /data/FILE
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS cuda

FROM debian:12
COPY --from=cuda /usr/local/cuda-13.0 /usr/local/cuda
ENV PATH=/usr/local/cuda/bin:$PATH
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /bbb
COPY scripts scripts
RUN scripts/setup.sh
COPY . .
ARG ARCHITECTURES=90a
RUN cmake -B build -G Ninja -DBBB_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="$ARCHITECTURES" \
  && scripts/build.sh bbb \
  && cmake --install build
