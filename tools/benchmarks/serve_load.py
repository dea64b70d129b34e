"""Load test of the service on loopback: throughput with and without batching, latency, and failed requests.

Starts ``unimo2 serve`` on free ports, sends a fixed number of requests from a fixed number of clients, and stops it. Bounded: a run ends after
``--requests`` requests per setting. The clients share the machine with the service, so the figures are a floor.

    python tools/benchmarks/serve_load.py --model output/demo/exported/vqa --image a.jpg --text "what colour is the ring?"
"""
import argparse
import base64
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[2]


def start(model, max_batch, max_wait):
    """(process, url) of a service of one model."""
    process = subprocess.Popen([sys.executable, "-m", "unimo2_paddle.cli", "serve", "-m", f"model={model}", "--port", "0", "--max-batch", str(max_batch),
                                "--max-wait", str(max_wait), "--max-pending", "256"], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    for line in process.stdout:
        told = json.loads(line)
        if told["event"] == "serving":
            threading.Thread(target=process.stdout.read, daemon=True).start()  # the log must not fill the pipe
            return process, told["url"]
    raise SystemExit(f"the service of {model} did not start")


def load(url, body, clients, requests):
    """Seconds of every request, and the number of those that failed, with ``clients`` connections at once."""
    times, failed, turns, lock, place = [], [], iter(range(requests)), threading.Lock(), urlsplit(url)

    def client():
        connection = http.client.HTTPConnection(place.hostname, place.port, timeout=60)
        while True:
            with lock:
                if next(turns, None) is None:
                    break
            began = time.perf_counter()
            try:
                connection.request("POST", "/v1/model", body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                answer.read()
                ok = answer.status == 200
            except OSError:
                ok = False
                connection.close()
            (times if ok else failed).append(time.perf_counter() - began)
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times, len(failed), time.perf_counter() - began


def main():
    """Print one row per setting, as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, metavar="DIR", help="exported model or checkpoint directory")
    parser.add_argument("--image", metavar="FILE", help="picture that every request sends")
    parser.add_argument("--text", metavar="TEXT", help="text that every request sends")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16], help="connections at once; default: 1 16")
    parser.add_argument("--requests", type=int, default=400, help="requests per setting; default: 400")
    args = parser.parse_args()
    body = {"image": base64.b64encode(Path(args.image).read_bytes()).decode()} if args.image else {}
    body = json.dumps({**body, **({"text": args.text} if args.text else {})})
    print("| batching | clients | requests/s | median ms | 95 % ms | failed |\n|---|---|---|---|---|---|")
    for name, max_batch, max_wait in (("off", 1, 0), ("up to 16, 5 ms", 16, 5)):
        process, url = start(args.model, max_batch, max_wait)
        try:
            load(url, body, 2, 10)
            for clients in args.clients:
                times, failed, seconds = load(url, body, clients, args.requests)
                times = sorted(times) or [float("nan")]
                print(f"| {name} | {clients} | {(args.requests - failed) / seconds:.1f} | {1000 * statistics.median(times):.1f} | "
                      f"{1000 * times[int(0.95 * (len(times) - 1))]:.1f} | {failed} of {args.requests} |", flush=True)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


if __name__ == "__main__":
    main()
