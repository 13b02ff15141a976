// Verilator writes the double underscore of a port array as ___05F.
// Fills the memories, runs matmuls one after another, reports the cycles of what happened.
#include "Vmatrix_top.h"
#include "verilated.h"
#include <cstdint>
#include <cstring>

static VerilatedContext* ctx; static Vmatrix_top* t; static int now_;
static void tick() { t->clk = 1; t->eval(); t->clk = 0; t->eval(); now_++; }

struct Job { uint32_t word[16]; int32_t shared, gap; };
struct Times { int32_t start, free, conflicts, first_a, last_a, first_b, last_b, first_psum,
               last_psum, first_write, last_write; };

extern "C" void reset() {
  ctx = new VerilatedContext; t = new Vmatrix_top{ctx};
  t->clk = 0; t->rst = 1; t->eval(); tick(); tick(); t->rst = 0; t->eval();
}
extern "C" void fill(int acc, const uint8_t* bytes, int count) {
  for (int a = 0; a < count; a += 16) {
    if (acc) { t->acc_write___05Fenable = 1; t->acc_write___05Faddress = a; t->acc_write___05Fsize = 16;
               memcpy(&t->acc_write___05Fdata, bytes + a, 16); }
    else { t->sram_write___05Fenable = 1; t->sram_write___05Faddress = a; t->sram_write___05Fsize = 16;
           memcpy(&t->sram_write___05Fdata, bytes + a, 16); }
    t->eval(); tick(); t->acc_write___05Fenable = 0; t->sram_write___05Fenable = 0; t->eval();
  }
}
extern "C" void read_acc(uint8_t* bytes, int count) {
  for (int a = 0; a < count; a += 16) {
    t->acc_read___05Fenable = 1; t->acc_read___05Faddress = a; t->acc_read___05Fsize = 16;
    t->eval(); tick(); t->acc_read___05Fenable = 0; t->eval();
    memcpy(bytes + a, &t->acc_read___05Fdata, 16);
  }
}
// Jobs start when the engine is free (plus gap). Events between one start and the next + `settle`
// belong to the job only when it is the only one; with several, look at conflicts and bits.
extern "C" void run(const Job* jobs, Times* times, int count, int settle) {
  int j = 0, wait = 0; bool running = false; int left = settle;
  Times* current = times;
  int base = now_;
  while (j < count || !t->free || left > 0) {
    t->start = 0;
    if (running && t->free) { times[j - 1].free = now_ - base; running = false; }
    if (!running && j < count && t->free) {
      if (wait < jobs[j].gap) wait++;
      else {
        wait = 0; current = times + j; memset(current, 0xff, sizeof *current);
        current->conflicts = 0;
        current->start = now_ - base;
        const uint32_t* w = jobs[j].word;
#define WORD(i) t->word___05F##i = w[i];
        WORD(0) WORD(1) WORD(2) WORD(3) WORD(4) WORD(5) WORD(6) WORD(7)
        WORD(8) WORD(9) WORD(10) WORD(11) WORD(12) WORD(13) WORD(14) WORD(15)
        t->shared = jobs[j].shared; t->start = 1; running = true; j++;
      }
    }
    t->eval();
    int n = now_ - base;
    if (t->conflict) current->conflicts++;
    if (t->a_enable) { if (current->first_a < 0) current->first_a = n; current->last_a = n; }
    if (t->b_enable) { if (current->first_b < 0) current->first_b = n; current->last_b = n; }
    if (t->psum_enable) { if (current->first_psum < 0) current->first_psum = n;
                          current->last_psum = n; }
    if (t->write_enable) { if (current->first_write < 0) current->first_write = n;
                           current->last_write = n; }
    if (j == count && t->free && !running) left--;
    tick();
    if (t->start) { t->start = 0; t->eval(); }
  }
}
