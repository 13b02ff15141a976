// The control core's stores from a script, a DRAM of fixed latency, and the cycle of every event.
#include "Vengines_top.h"
#include "verilated.h"
#include <cstdint>
#include <cstring>
#include <deque>

struct Store { uint32_t delay, bank, word, value; };
struct Times { int32_t presented, entry, start, free, finish; };
enum { LOAD_WRITE, STORE_READ, STORE_SEND, RESULT, REQUEST, KINDS };

static void tick(Vengines_top* t) { t->clk = 1; t->eval(); t->clk = 0; t->eval(); }

static void host(Vengines_top* t, int acc, int write, uint8_t* bytes, int count, int width) {
  for (int a = 0; a < count; a += width) {
    t->host = 1; t->host_acc = acc; t->host_write = write; t->host_address = a;
    if (write) memcpy(&t->host_in, bytes + a, width);
    t->eval(); tick(t); t->host = 0; t->eval();
    if (!write) memcpy(bytes + a, &t->host_out, width);
  }
}

// Returns the number of cycles with a bank-port conflict, or -1 when the run did not end.
extern "C" int run(uint8_t* sram, int sram_bytes, uint8_t* acc, int acc_bytes, uint8_t* dram,
                   const uint32_t* base, const Store* script, int stores, Times* times,
                   int commands, int latency, int width, int phase, int32_t* events[KINDS],
                   int32_t* counts, int limit) {
  VerilatedContext ctx; Vengines_top* t = new Vengines_top{&ctx};
  t->clk = 0; t->rst = 1; t->eval(); tick(t); tick(t); t->rst = 0; t->eval();
  host(t, 0, 1, sram, sram_bytes, width); host(t, 1, 1, acc, acc_bytes, width);
  // Slots have run meanwhile: cycle 0 is the next cycle in which the slot phase is 0 again.
  int passed = sram_bytes / width + acc_bytes / width;
  while (passed % phase) { tick(t); passed++; }
  t->slot_base___05F0 = base[0]; t->slot_base___05F1 = base[1];
  t->slot_base___05F2 = base[2]; t->slot_base___05F3 = base[3];
  int conflicts = 0, next = 0, entered = 0, done = 0, since = 0, settle = 0;
  bool presented = false;
  struct Answer { int when; uint8_t bytes[64]; };
  std::deque<Answer> answers;
  int now = 0;
  for (; now < limit; now++) {
    t->valid = 0;
    if (next < stores && since >= (int)script[next].delay) {
      t->valid = 1; t->bank = script[next].bank; t->word = script[next].word;
      t->value = script[next].value;
      if (!presented && script[next].word == 0) times[entered].presented = now;
      presented = true;
    }
    t->response = 0;
    if (!answers.empty() && answers.front().when == now) {
      t->response = 1; memcpy(&t->response_data, answers.front().bytes, 64);
      answers.pop_front();
    }
    t->eval();
    since++;
    if (t->valid && t->ready) { next++; since = 1; presented = false; }
    if (t->entered) times[entered++].entry = now;
    if (t->start) times[t->start_index].start = now;
    for (int e = 0; e < 3; e++) if (t->freed >> e & 1)
      times[t->freed_index >> 16 * e & 0xffff].free = now;
    const uint16_t* index = (const uint16_t*)&t->entry_index;
    for (int i = 0; i < 8; i++) if (t->finished >> i & 1) {
      times[index[i]].finish = now + 1; done++;
    }
    conflicts += t->conflict;
    if (t->seen_load_write) events[LOAD_WRITE][counts[LOAD_WRITE]++] = now;
    if (t->seen_store_read) events[STORE_READ][counts[STORE_READ]++] = now;
    if (t->seen_result) events[RESULT][counts[RESULT]++] = now;
    if (t->request) {
      Answer a; a.when = now + latency; memcpy(a.bytes, dram + t->request_address, 64);
      answers.push_back(a); events[REQUEST][counts[REQUEST]++] = now;
    }
    if (t->send) { memcpy(dram + t->send_address, &t->send_data, t->send_size);
                   events[STORE_SEND][counts[STORE_SEND]++] = now; }
    tick(t);
    if (done == commands && settle++ > 400) break;
  }
  t->valid = 0; t->response = 0; t->eval();
  host(t, 0, 0, sram, sram_bytes, width); host(t, 1, 0, acc, acc_bytes, width);
  delete t;
  return now < limit ? conflicts : -1;
}
