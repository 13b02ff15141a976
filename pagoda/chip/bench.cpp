// The world around a Verilated chip: clock, DRAM of fixed latency, and a log of what the windows do.
// Ports are given as addresses, so that one file serves every chip.
#include <cstdint>
#include <cstring>
#include <deque>
#include <vector>

struct Instance;
extern "C" void clock_low(Instance*);
extern "C" void clock_high(Instance*);

struct Core {  // addresses of the model's ports; addresses and masks are 64 bits wide
  uint8_t *read; uint64_t *read_address; uint8_t *valid; uint32_t *data;
  uint8_t *write; uint64_t *write_address; uint32_t *write_data; uint64_t *write_mask;
  uint8_t *enter; uint32_t *job;
  uint8_t *start; uint32_t *start_index; uint8_t *start_cause;
  uint8_t *freed[4]; uint32_t *freed_index[4];
  uint8_t *finished[16]; uint32_t *finished_index[16];
};
// reads: the core's DRAM reads whose slots opened before the event's cycle (START and FREE only).
struct Event { int64_t cycle; int32_t core, kind, index, cause; int64_t reads; };
enum { ENTER, START, FREE, FINISH };
struct Answer { int64_t due; uint8_t bytes[64]; };
struct Due { int64_t cycle; size_t event; };
// What a core has asked of DRAM; the bytes of every write, and events that wait for their reads.
struct Traffic { int64_t reads; std::vector<uint8_t> written; std::deque<Due> waiting; };
struct World {
  std::vector<Core> cores; std::vector<std::deque<Answer>> answers;
  uint8_t *enable; uint8_t *busy; uint8_t *begin; uint8_t *conflict; uint8_t *dram; uint64_t dram_bytes;
  int64_t latency, read_delay, now, frozen, conflicts; int window, job_words; bool logging;
  std::vector<Traffic> traffic;
  std::vector<Event> events; std::vector<uint32_t> jobs;
  int64_t read_atoms, write_atoms;
};

extern "C" {
World* world_create(const Core* cores, int count, uint8_t* enable, uint8_t* busy,
                    uint8_t* begin, uint8_t* conflict, uint8_t* dram, uint64_t dram_bytes, int64_t latency,
                    int64_t read_delay, int window, int job_words) {
  World* w = new World{};
  w->cores.assign(cores, cores + count); w->answers.resize(count);
  w->enable = enable; w->busy = busy; w->begin = begin; w->conflict = conflict;
  w->dram = dram; w->dram_bytes = dram_bytes; w->latency = latency; w->read_delay = read_delay;
  w->window = window; w->job_words = job_words;
  return w;
}
void world_destroy(World* w) { delete w; }
void world_begin(World* w, int logging) {
  w->now = w->frozen = w->conflicts = w->read_atoms = w->write_atoms = 0;
  w->logging = logging; w->events.clear(); w->jobs.clear();
  w->traffic.assign(w->cores.size(), Traffic{});
  for (auto& queue : w->answers) queue.clear();
}
int64_t world_counter(World* w, int which) {
  const int64_t values[] = {w->now, w->frozen, w->conflicts, w->read_atoms, w->write_atoms,
                            (int64_t)w->events.size()};
  return values[which];
}
void world_log(World* w, Event* events, uint32_t* jobs) {
  memcpy(events, w->events.data(), w->events.size() * sizeof(Event));
  memcpy(jobs, w->jobs.data(), w->jobs.size() * sizeof(uint32_t));
}
int64_t world_writes(World* w, int core) { return w->traffic[core].written.size(); }
void world_written(World* w, int core, uint8_t* sizes) {
  const auto& written = w->traffic[core].written;
  memcpy(sizes, written.data(), written.size());
}

static void log_event(World* w, int core, Event event) {
  w->traffic[core].waiting.push_back({event.cycle + w->read_delay, w->events.size()});
  w->events.push_back(event);
}

static void log_core(World* w, int number) {
  Core& c = w->cores[number];
  if (*c.enter) {  // the window takes a command in the cycle after its entry
    w->events.push_back({w->now - 1, number, ENTER, -1, 0, 0});
    w->jobs.insert(w->jobs.end(), c.job, c.job + w->job_words);
  }
  if (*c.start)
    log_event(w, number, {w->now, number, START, (int32_t)*c.start_index, *c.start_cause, 0});
  for (int e = 0; e < 4; e++) if (*c.freed[e])
    log_event(w, number, {w->now, number, FREE, (int32_t)*c.freed_index[e], 0, 0});
  for (int e = 0; e < w->window; e++) if (*c.finished[e])
    w->events.push_back({w->now, number, FINISH, (int32_t)*c.finished_index[e], 0, 0});
  Traffic& traffic = w->traffic[number];
  for (; !traffic.waiting.empty() && traffic.waiting.front().cycle <= w->now;
       traffic.waiting.pop_front())
    w->events[traffic.waiting.front().event].reads = traffic.reads;
  traffic.reads += *c.read;
  if (*c.write) traffic.written.push_back(__builtin_popcountll(*c.write_mask));
}

static void serve(World* w, int number) {
  Core& c = w->cores[number];
  if (*c.read) {
    Answer answer{w->now + w->latency, {}};
    if (*c.read_address + 64 <= w->dram_bytes) memcpy(answer.bytes, w->dram + *c.read_address, 64);
    w->answers[number].push_back(answer); w->read_atoms++;
  }
  if (*c.write && *c.write_address + 64 <= w->dram_bytes) {
    const uint8_t* data = (const uint8_t*)c.write_data;
    uint8_t* target = w->dram + *c.write_address;
    for (int i = 0; i < 64; i++) if (*c.write_mask >> i & 1) target[i] = data[i];
    w->write_atoms++;
  }
}

// Clock until no launch runs, at most `clocks` times and up to contract cycle `until`; whether the
// launch still runs.
int world_run(World* w, Instance* instance, int64_t clocks, int64_t until) {
  for (; clocks > 0; clocks--) {
    clock_low(instance);
    w->conflicts += *w->conflict;
    if (*w->enable) {
      if (*w->begin) w->now = -1;  // the next cycle is the launch's cycle 0
      for (size_t k = 0; k < w->cores.size(); k++) {
        if (w->logging) log_core(w, k);
        serve(w, k);
      }
      w->now++;
    } else {
      w->frozen++;
    }
    bool moved = *w->enable;
    clock_high(instance);
    if (moved) for (size_t k = 0; k < w->cores.size(); k++) {
      auto& queue = w->answers[k];
      *w->cores[k].valid = !queue.empty() && queue.front().due == w->now;
      if (*w->cores[k].valid) {
        memcpy(w->cores[k].data, queue.front().bytes, 64); queue.pop_front();
      }
    }
    if (!*w->busy || w->now >= until) break;
  }
  clock_low(instance);  // where everybody else finds it
  return *w->busy;
}
}
