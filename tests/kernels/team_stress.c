/* Runs a thread team over phases that depend on each other and compares with one thread: team_stress THREADS RUNS. */
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>

#include "team.h"

#define ITEMS 64
#define LAYERS 12

typedef struct {
    long *a, *b;
    long items, chunk;
} job;

static long forth(const job *j, long i) { return j->a[(i * 7 + 1) % j->items] + 1; }
static long back(const job *j, long i) { return (j->b[(i * 5 + 3) % j->items] * 3 + i) & 0xffff; }

/* Each phase reads what all items of the one before wrote. Members stray behind at different places. */
static void work(member *me, const void *arg) {
    const job *j = arg;
    for (int layer = 0; layer < LAYERS; layer++) {
        share s = share_of(me, j->items, j->chunk);
        for (int64_t from, to; share_take(&s, &from, &to);)
            for (int64_t i = from; i < to; i++) j->b[i] = forth(j, i);
        s = share_of(me, 0, 1); /* an empty phase, open beside the other */
        for (int64_t from, to; share_take(&s, &from, &to);) abort();
        team_wait(me);
        if ((me->id + layer) % 3 == 0) sched_yield();
        s = share_of(me, j->items, 1);
        for (int64_t from, to; share_take(&s, &from, &to);)
            for (int64_t i = from; i < to; i++) j->a[i] = back(j, i);
        team_wait(me);
    }
}

static void work_alone(const job *j) {
    for (int layer = 0; layer < LAYERS; layer++) {
        for (long i = 0; i < j->items; i++) j->b[i] = forth(j, i);
        for (long i = 0; i < j->items; i++) j->a[i] = back(j, i);
    }
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    long a[ITEMS], b[ITEMS], want[ITEMS], other[ITEMS], runs = atol(argv[2]);
    for (int i = 0; i < ITEMS; i++) a[i] = want[i] = i;
    team *t = team_make(atoi(argv[1]));
    for (long run = 0; run < runs; run++) {
        job shared = {a, b, 1 + run % ITEMS, 1 + run % 5}, alone = {want, other, shared.items, 1};
        team_run(t, work, &shared);
        work_alone(&alone);
        for (int i = 0; i < ITEMS; i++)
            if (a[i] != want[i]) {
                printf("run %ld, item %d: %ld instead of %ld\n", run, i, a[i], want[i]);
                return 1;
            }
    }
    team_free(t);
    puts("equal");
    return 0;
}
