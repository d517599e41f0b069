"""Times of a CUDA graph."""
import torch


def replay_ms(graph, n):
    """Milliseconds of each of n replays of a graph, by the GPU's clock."""
    times = []
    for _ in range(n):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times
