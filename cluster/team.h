/* The OpenMP team that torch computes with, for C code that is not compiled with OpenMP. */

#ifndef SWITCHYARD_TEAM_H
#define SWITCHYARD_TEAM_H

#define _GNU_SOURCE
#include <dlfcn.h>

/* libgomp's entry point for "#pragma omp parallel" (libgomp/libgomp_g.h). Looked up instead of linked, so that it is the
 * one that torch has loaded: another copy would have other threads. */
typedef void (*parallel_fn)(void (*)(void *), void *, unsigned num_threads, unsigned flags);

/* Run `work(data)` in each of num_threads threads, the caller's among them; in the caller's alone without libgomp. */
static void run_in_team(void (*work)(void *), void *data, int num_threads)
{
    static parallel_fn parallel;
    if (!parallel) {
        void *gomp = dlopen("libgomp.so.1", RTLD_NOLOAD | RTLD_NOW);
        parallel = (parallel_fn)dlsym(gomp ? gomp : RTLD_DEFAULT, "GOMP_parallel");
    }
    if (parallel && num_threads > 1)
        parallel(work, data, (unsigned)num_threads, 0);
    else
        work(data);
}

#endif
